"""The page of a report: its style sheet and its frame. Self-contained, light and dark."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d1d1f; --soft: #6e6e73; --rule: #e6e6e3;
  --good: #1a7f4b; --bad: #b3261e;
  --series-1: #2f5fd0; --series-2: #d9730d; --series-3: #0f8b76; --series-4: #9a4fb8;
  --series-5: #8a8a84;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161617; --card: #1e1e20; --ink: #ececec; --soft: #98989d; --rule: #323235;
    --good: #5cc98f; --bad: #ff8a80;
    --series-1: #7aa2ff; --series-2: #ffa657; --series-3: #4fd1b5; --series-4: #d2a0f0;
    --series-5: #a0a09a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 28px; font-weight: 650; letter-spacing: -0.015em; margin: 0; }
h2 { font-size: 18px; font-weight: 620; letter-spacing: -0.01em; margin: 44px 0 14px; }
h3 { font-size: 13.5px; font-weight: 600; margin: 0 0 8px; }
p.lead { color: var(--soft); margin: 6px 0 0; max-width: 78ch; }
p.note { color: var(--soft); font-size: 13px; margin: 8px 0 0; max-width: 90ch; }
p.note + .charts { margin-top: 16px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 14px;
  margin-top: 28px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; min-width: 0; }
.fact .label { color: var(--soft); font-size: 12.5px; }
.fact .value { font-size: 23px; font-weight: 600; letter-spacing: -0.01em; white-space: nowrap; }
.fact .value small { font-size: 14px; font-weight: 400; color: var(--soft); }
.fact .more { color: var(--soft); font-size: 12.5px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 16px; }
.charts.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
svg .axes line { stroke: var(--rule); stroke-width: 1; }
svg .line { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-width: 1; opacity: 0.35; }
svg .layer { opacity: 0.85; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft);
  margin-bottom: 6px; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 50%;
  margin-right: 6px; }
.legend b { color: var(--ink); font-weight: 600; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption { color: var(--soft); font-size: 12.5px; margin-top: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 16px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr));
  gap: 18px 16px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
tr:last-child th, tr:last-child td { border-bottom: 0; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td.num, th.num { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
.wide { overflow-x: auto; }
.small table { font-size: 13.5px; }
.pair.small th, .pair.small td { font-size: 12.5px; padding-top: 3px; padding-bottom: 3px; }
.small th:first-child { white-space: normal; }
.better { color: var(--good); } .worse { color: var(--bad); }
pre { margin: 0; font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-x: auto; }
footer { color: var(--soft); font-size: 12.5px; margin-top: 48px; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header><h1>$heading</h1><p class="lead">$lead</p></header>
$body
<footer>$footer</footer>
</main>
</body>
</html>
""")


def card(content: str, kind: str = "") -> str:
    """A bordered box."""
    return f'<div class="card {kind}">{content}</div>'


def section(title: str, content: str) -> str:
    """A headed part of the page; nothing if there is nothing in it."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""
