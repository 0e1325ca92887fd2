/* An orbit view of cameras on a canvas: dragging and the arrow keys turn it, two fingers or the wheel zoom. */
(function () {
  "use strict";
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((each) => { each.open = true; });
  });
  const canvas = document.getElementById("cameras3d");
  if (!canvas) return;
  const cameras = JSON.parse(document.getElementById("cameras3d-data").textContent);
  const context = canvas.getContext("2d");
  const state = { azimuth: -0.9, elevation: 0.45, zoom: 1.0 };
  const size = Math.max(1e-6, ...cameras.flatMap((camera) => camera.true.slice(9).map(Math.abs)));
  const length = 0.12 * size;
  window.cameras3d = state;

  function project(point) {
    const ca = Math.cos(state.azimuth), sa = Math.sin(state.azimuth);
    const ce = Math.cos(state.elevation), se = Math.sin(state.elevation);
    const right = ca * point[1] - sa * point[0];
    const towards = ca * point[0] + sa * point[1];
    const up = ce * point[2] - se * towards;
    const scale = 0.36 * Math.min(canvas.width, canvas.height) * state.zoom / size;
    return [canvas.width / 2 + scale * right, canvas.height * 0.56 - scale * up];
  }

  function line(a, b, colour, width) {
    const p = project(a), q = project(b);
    context.strokeStyle = colour;
    context.lineWidth = width * (window.devicePixelRatio || 1);
    context.beginPath();
    context.moveTo(p[0], p[1]);
    context.lineTo(q[0], q[1]);
    context.stroke();
  }

  /* columns: right, up, back, place, three numbers each */
  function camera(columns, colour, width) {
    const at = (i) => columns.slice(3 * i, 3 * i + 3);
    const right = at(0), up = at(1), back = at(2), place = at(3);
    const corner = (x, y) => place.map((p, k) => p + length * (0.45 * x * right[k] + 0.35 * y * up[k] - back[k]));
    const corners = [corner(-1, -1), corner(1, -1), corner(1, 1), corner(-1, 1)];
    corners.forEach((point, i) => {
      line(place, point, colour, width);
      line(point, corners[(i + 1) % 4], colour, width);
    });
    line(corners[2], corners[3], colour, 2.2 * width);
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const soft = getComputedStyle(canvas).getPropertyValue("--soft") || "#888";
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]].forEach((axis, i) => {
      const end = axis.map((value) => 0.4 * size * value);
      line([0, 0, 0], end, soft, 1);
      const p = project(end);
      context.fillStyle = soft;
      context.font = 12 * ratio + "px sans-serif";
      context.fillText("xyz"[i], p[0] + 4 * ratio, p[1] - 4 * ratio);
    });
    for (let i = 0; i < 72; i += 1) {
      const ring = (k) => [size * Math.cos(k * Math.PI / 36), size * Math.sin(k * Math.PI / 36), 0];
      line(ring(i), ring(i + 1), soft, 0.4);
    }
    cameras.forEach((each) => {
      if (each.estimated) line(each.true.slice(9), each.estimated.slice(9), soft, 0.8);
    });
    cameras.forEach((each) => camera(each.true, "#2f8fd0", 0.9));
    cameras.forEach((each) => { if (each.estimated) camera(each.estimated, "#e0662a", 0.9); });
  }

  function turn(azimuth, elevation) {
    state.azimuth += azimuth;
    state.elevation = Math.min(1.57, Math.max(-1.57, state.elevation + elevation));
    draw();
  }

  function zoom(factor) {
    state.zoom = Math.min(8, Math.max(0.3, state.zoom * factor));
    draw();
  }

  const fingers = new Map();
  const apart = () => {
    const [a, b] = [...fingers.values()];
    return Math.max(1, Math.hypot(a[0] - b[0], a[1] - b[1]));
  };
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    const before = fingers.size === 2 ? apart() : 0;
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (fingers.size === 2) zoom(apart() / before);
    else turn(-(event.clientX - last[0]) * 0.01, (event.clientY - last[1]) * 0.01);
  });
  ["pointerup", "pointercancel"].forEach((name) => {
    canvas.addEventListener(name, (event) => { fingers.delete(event.pointerId); });
  });
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas) return; /* the page scrolls on until the view is chosen */
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * 0.001));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
    if (!step) return;
    event.preventDefault();
    turn(step[0], step[1]);
  });

  window.addEventListener("resize", draw);
  ["(prefers-color-scheme: dark)", "print"].forEach((query) => {
    window.matchMedia(query).addEventListener("change", draw);
  });
  draw();
})();
