(() => {
  for (const report of document.querySelectorAll(".vdcache-report")) {
    if (report.dataset.ready) continue;
    report.dataset.ready = "1";
    const tip = report.querySelector(".tip");
    report.addEventListener("mousemove", (event) => {
      const target = event.target.closest("[data-tip]");
      tip.hidden = !target;
      if (!target) return;
      tip.textContent = target.dataset.tip;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
      tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
    });
    report.addEventListener("mouseleave", () => { tip.hidden = true; });
  }
})();
