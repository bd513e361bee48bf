"""How the page of a report looks, in light and dark, and the few lines that sort its tables."""

HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CogViT training report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --ink: #1c1d1f; --quiet: #686b70; --rule: #e4e4e1; --accent: #2a6fdb;
  --series-1: #2a6fdb; --series-2: #d9622b; --series-3: #17936a; --series-4: #8a55c8; --series-5: #b8860b;
  --series-6: #c23b6b;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #131416; --card: #1b1d20; --ink: #ececea; --quiet: #9a9da3; --rule: #303338; --accent: #6ea4ff;
  --series-1: #6ea4ff; --series-2: #f08a55; --series-3: #45c496; --series-4: #b58cf0; --series-5: #dcb04a;
  --series-6: #ee7fa4;
} }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  /* Glyphs inside the page, for machines without such a font; first, or Chromium leaves the first words in boxes. */
  font: 16px/1.55 "Report CJK", system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 0 0 1rem; }
h3 { font-size: 0.95rem; margin: 2rem 0 0.5rem; }
header p { color: var(--quiet); margin: 0.4rem 0 0; }
section { margin-top: 3rem; }
figure { margin: 0 0 1.5rem; }
figcaption { color: var(--quiet); font-size: 0.875rem; margin-top: 0.4rem; }
img { display: block; width: 100%; border-radius: 8px; background: #fff; }
.cards { display: flex; flex-wrap: wrap; gap: 1px; background: var(--rule);
  border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
.cards div { flex: 1 1 6.5rem; background: var(--card); padding: 0.8rem 0.9rem; }
.cards b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.cards span { color: var(--quiet); font-size: 0.8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 0.9rem 0.9rem 0.4rem;
  margin: 0; display: flex; flex-direction: column; justify-content: space-between; }
.chart figcaption { margin: 0 0 0.5rem; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; }
.chart figcaption > b { color: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; }
.legend i { display: inline-block; width: 0.8em; height: 0.2em; border-radius: 1px; margin-right: 0.4em;
  vertical-align: 0.25em; }
.legend em { font-style: normal; color: var(--ink); font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.grid { stroke: var(--rule); stroke-width: 1; }
.raw { stroke-width: 1; opacity: 0.3; }
.line { stroke-width: 2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.45rem 0.9rem 0.45rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pairs td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; width: 100%; }
small { color: var(--quiet); }
td:first-child { white-space: nowrap; }
.bar { width: 36%; padding-right: 0; }
.bar div { position: relative; height: 0.55rem; margin-top: 0.45rem; background: var(--rule); border-radius: 3px; }
.bar b { display: block; height: 100%; background: var(--accent); border-radius: 3px; }
.bar i { position: absolute; top: -0.2rem; bottom: -0.2rem; width: 2px; background: var(--ink); }
@media (max-width: 40rem) { .bar { display: none; } th, td { padding-right: 0.5rem; } table { font-size: 0.8rem; }
  td:first-child { white-space: normal; } }
.example { display: flex; gap: 1rem; padding: 0.7rem 0; border-bottom: 1px solid var(--rule); }
.example > div { flex: 0 0 9rem; font-weight: 600; }
.example ol { flex: 1; display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 0.5rem; margin: 0;
  padding: 0; list-style: none; }
.example li { padding: 0.3rem; border: 2px solid transparent; border-radius: 8px; }
.example .right { border-color: var(--series-3); }
.example img { width: 4rem; max-width: 100%; height: 4rem; object-fit: contain; image-rendering: pixelated;
  margin-bottom: 0.3rem; }
.example span { display: block; font-size: 0.8rem; line-height: 1.3; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .example { flex-direction: column; } .example > div { flex-basis: auto; } }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--quiet); font-size: 0.9rem; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem; overflow-x: auto;
  font: 0.8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
th.sorts { cursor: pointer; }
th.sorts::after { content: "\\2195"; opacity: 0.35; margin-left: 0.3em; }
@media (max-width: 40rem) { th.sorts::after { content: none; } }
</style>
<script>
addEventListener("click", event => {
  const head = event.target.closest("th.sorts");
  if (!head) return;
  const table = head.closest("table"), column = [...head.parentNode.children].indexOf(head);
  const down = head.dataset.down = head.dataset.down === "1" ? "" : "1";
  const value = row => row.children[column].dataset.value ?? row.children[column].textContent;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)], both = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
    return (both ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
  });
  table.tBodies[0].append(...rows);
});
</script>"""
