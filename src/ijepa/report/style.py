"""The page's style sheet: one column of text, pictures as wide as the page, light and dark by the reader's setting."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1d2126; --soft: #626a73; --rule: #dfe2e5; --wash: #f3f4f3;
  --c1: #1f6fb2; --c2: #d1702a; --c3: #2b8a5e; --c4: #8a5fb0;
  --context: rgb(60 150 255 / .27); --right: #1a8a4a; --wrong: #c8382e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e3e6e9; --soft: #9aa3ac; --rule: #31373d; --wash: #1c2024;
    --c1: #6cb2ee; --c2: #f0a060; --c3: #62c897; --c4: #bd98e0; --right: #4cc37f; --wrong: #f0786c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 1rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
h4 { font-size: .9rem; margin: 0; }
p { max-width: 46rem; margin: .6rem 0; }
.lede { max-width: none; font-size: 1.1rem; color: var(--soft); margin: 0 0 1.4rem; }
section { margin-top: 3rem; }
a { color: var(--c1); text-underline-offset: .15em; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1.6rem 0 0; font-size: .9rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .88em; overflow-wrap: anywhere; }
pre {
  font-size: .8rem; line-height: 1.5; overflow-x: auto; background: var(--wash); border-radius: 6px; padding: 1rem;
}
.command { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0; }
.gap {
  max-width: none; margin: 3rem 0 0; padding: .6rem .9rem; background: var(--wash); border-radius: 6px;
  color: var(--soft); font-size: .92rem;
}
.gap strong { color: var(--ink); font-weight: 600; }

figure { margin: 0 0 1.6rem; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.5; max-width: 50rem; margin-top: .6rem; }
img, svg { display: block; width: 100%; height: auto; }
.exact { image-rendering: pixelated; }
.scroll { overflow-x: auto; padding-bottom: 2px; }
.scroll:focus-visible { outline: 2px solid var(--c1); outline-offset: 3px; }

dl { margin: 0; }
dt { color: var(--soft); font-size: .82rem; }
dd { margin: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .9rem 2.2rem; }
.tiles dd { font-size: 1.12rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem 1.5rem; }
.facts dd { font-size: .92rem; overflow-wrap: anywhere; }

table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .45rem 0 .45rem 1.8rem; text-align: right; font-weight: 400; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--soft); font-size: .85rem; vertical-align: bottom; border-bottom: 1.5px solid var(--soft); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.worded th:last-child, .worded td:last-child { text-align: left; min-width: 12rem; }
th small, td small { display: block; color: var(--soft); font-size: .78rem; line-height: 1.35; }
td small { white-space: nowrap; }
strong { font-weight: 700; }

.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.4rem 1.8rem; }
.panels figure { margin: 0; display: grid; grid-row: span 3; grid-template-rows: subgrid; row-gap: 0; }
.plot-head {
  display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline;
  gap: 0 1rem; margin-bottom: .3rem;
}
.plot figcaption { font-size: .8rem; line-height: 1.45; margin-top: .2rem; }
.values { display: flex; gap: .9rem; font-size: .8rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.values b { color: var(--ink); font-weight: 600; }
.plot svg, .bars svg { font-family: inherit; stroke-linejoin: round; }
.bars svg { max-width: 40rem; }
.swatch {
  display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; vertical-align: -.05em;
}

.grid { display: grid; gap: 5px; align-items: center; }
.grid img, .grid svg { border-radius: 3px; }
.grid .name { color: var(--soft); font-size: .84rem; line-height: 1.25; padding-right: .5em; }
.grid .over { color: var(--soft); font-size: .84rem; align-self: end; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; color: var(--soft); font-size: .84rem; max-width: none; }
.context { fill: var(--context); }
.hidden { fill: #0b0d10; opacity: .7; }
.rim { fill: none; stroke: #0b0d10; stroke-opacity: .75; }
.hit { position: relative; display: block; border: 3px solid transparent; border-radius: 5px; }
.hit.right { border-color: var(--right); } .hit.wrong { border-color: var(--wrong); }
.hit b {
  position: absolute; right: -3px; bottom: -3px; width: 1.25em; height: 1.25em; font-size: .72rem; line-height: 1.25em;
  text-align: center; color: #fff; border-radius: 4px 0 5px 0;
}
.hit.right b { background: #1a8a4a; } .hit.wrong b { background: #c8382e; }
footer { margin-top: 4rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
footer { color: var(--soft); font-size: .85rem; }
@media print { body { font-size: 11pt; } section { break-inside: avoid-page; } nav { display: none; } }
""".strip()
