// Thumbnails of the samples: a click takes one.
element.querySelectorAll("[data-sample]").forEach((button) =>
  button.addEventListener("click", () => trigger("sample", { sample: button.dataset.sample })));
