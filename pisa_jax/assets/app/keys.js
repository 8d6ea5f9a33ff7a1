// gradio's sliders report a release of the pointer only. A key that moves one is released, too.
document.addEventListener("keyup", (event) => {
  const moves = ["Arrow", "Page", "Home", "End"].some((start) => event.key.startsWith(start));
  if (moves && event.target.matches?.("#controls input[type=range]")) {
    event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
  }
});
// The number beside a slider takes effect when it loses the focus. Enter is enough, too.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches?.("#controls input[type=number]")) event.target.blur();
});
