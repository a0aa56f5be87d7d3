"use strict";
// Values under the pointer, in every chart.
const text = (value) => String(Number(value.toPrecision(5)));
for (const area of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(area.dataset.chart);
  const cursor = document.createElement("div"), tip = document.createElement("div");
  cursor.className = "cursor";
  tip.className = "tip";
  const nearest = (points, step) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] > step) high = middle; else low = middle;
    }
    return Math.abs(points[high][0] - step) < Math.abs(points[low][0] - step) ? points[high] : points[low];
  };
  const show = (event) => {
    const box = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = chart.first + share * (chart.last - chart.first);
    const found = chart.curves.filter((curve) => curve.points.length).map((curve) => [curve, nearest(curve.points, wanted)]);
    if (!found.length) return;
    const steps = found.map(([, point]) => point[0]);
    const step = steps.reduce((best, each) => (Math.abs(each - wanted) < Math.abs(best - wanted) ? each : best));
    const at = (step - chart.first) / (chart.last - chart.first);
    cursor.style.left = `${100 * at}%`;
    tip.replaceChildren(`step ${step.toLocaleString("en")}`);
    for (const [curve, point] of found) {
      const line = document.createElement("div");
      line.className = `c${curve.colour}`;
      const other = point[0] === step ? "" : ` (step ${point[0].toLocaleString("en")})`;
      line.textContent = `${curve.name} ${text(point[1])}${other}`;
      tip.append(line);
    }
    area.append(cursor, tip);
    const room = box.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, at < 0.5 ? at * box.width + 12 : at * box.width - tip.offsetWidth - 12))}px`;
  };
  const hide = () => { cursor.remove(); tip.remove(); };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", hide);
}
// A click plays a sample; the browser's own controls would cover small ones.
for (const video of document.querySelectorAll("video")) {
  video.removeAttribute("controls");
  video.title = "click to play or stop";
  video.addEventListener("click", () => { if (video.paused) video.play(); else video.pause(); });
}
// All samples of a grid at once.
for (const button of document.querySelectorAll("button.all")) {
  const videos = [...button.closest("section").querySelectorAll("video")];
  let playing = false;
  button.hidden = !videos.length;
  button.addEventListener("click", () => {
    playing = !playing;
    button.textContent = playing ? "stop all" : "play all";
    for (const video of videos) {
      video.currentTime = 0;
      if (playing) video.play(); else video.pause();
    }
  });
}
