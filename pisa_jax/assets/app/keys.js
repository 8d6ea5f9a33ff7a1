// gradio's sliders report a release of the pointer only. A key that moves one is released, too.
document.addEventListener("keyup", (event) => {
  const moves = ["Arrow", "Page", "Home", "End"].some((start) => event.key.startsWith(start));
  if (moves && event.target.matches?.("#controls input[type=range]")) {
    event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }
});
