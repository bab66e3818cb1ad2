// The chosen appearance, before anything is drawn: a script of its own, as the page's modules run later.
try {
  const chosen = localStorage.getItem("desk.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is off: the page looks as the system does
}
