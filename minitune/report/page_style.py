"""The look of the report, added to that of every page (data/inspector/page_parts.py).

The colours of two runs are blue and orange of the Okabe-Ito palette, which people who are
colour-blind tell apart. The second run's strokes are dashed, and its markers are squares.
"""

STYLE = """
:root { --run-1: #0072b2; --run-2: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --run-1: #56b4e9; --run-2: #e69f00; } }
h1 .name { display: block; }
.badge {
  display: inline-block; padding: .1rem .6rem; border-radius: 1rem; vertical-align: .2rem;
  background: var(--trained); color: var(--trained-text); font-size: .8rem; font-weight: 600;
}
.badge.open { background: var(--fault-page); color: var(--fault); }
.model { margin-top: .25rem; overflow-wrap: anywhere; }
.totals b + b, .totals span + b { margin-top: .35rem; }
dd .change { margin-left: .25rem; font-weight: 400; }
.notes { margin-top: .75rem; background: var(--fault-page); font-size: .9rem; }
.notes p { margin: 0; padding: .5rem 1rem; overflow-wrap: anywhere; }
.notes p + p { border-top: 1px solid var(--line); }
.run-1 { --own: var(--run-1); --dash: none; --edge: solid; }
.run-2 { --own: var(--run-2); --dash: 6 3; --edge: dashed; }
.evaluation { --dash: none; }
.swatch { width: 1.5rem; height: .8rem; margin-right: .45rem; vertical-align: -.05rem; }
.swatch line { stroke: var(--own); stroke-width: 3; stroke-dasharray: var(--dash); }
.swatch .evaluation { stroke-width: 2; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; }
.chart { margin: 0; padding: .8rem 1rem .7rem; min-width: 0; break-inside: avoid; }
.chart.wide { grid-column: 1 / -1; }
.chart .legend { margin: .15rem 0 .9rem; min-height: 1.3rem; }
.chart .legend > span { overflow-wrap: anywhere; }
.legend b { font-variant-numeric: tabular-nums; }
.chart .step { float: right; font-variant-numeric: tabular-nums; }
.plot {
  display: block; width: calc(100% - 3.9rem); height: 11rem; margin: 0 0 1.7rem 3.4rem;
  overflow: visible; touch-action: pan-y; outline-offset: .5rem;
}
.wide .plot { height: 17rem; }
.grid { stroke: var(--line); }
.plot text {
  fill: var(--quiet); font-size: .75rem; font-variant-numeric: tabular-nums; text-anchor: middle;
}
.plot text.y, .plot text.end { text-anchor: end; }
.curves { overflow: visible; }
.curves path {
  fill: none; stroke: var(--own); stroke-width: 2; stroke-dasharray: var(--dash);
  stroke-linejoin: round; stroke-linecap: butt; vector-effect: non-scaling-stroke;
}
.curves path.faint { stroke-width: 1; stroke-dasharray: none; opacity: .3; }
.curves path.evaluation { stroke-width: 1.5; opacity: .7; }
.marker { fill: var(--card); stroke: var(--own); stroke-width: 2; }
.dot { fill: var(--own); stroke: var(--card); stroke-width: 1.5; }
.cursor { stroke: var(--quiet); visibility: hidden; }
.pointed .cursor { visibility: visible; }
.remark { margin: 0; padding: .5rem 1rem; font-size: .85rem; }
.chart .remark { padding: 0 0 0 3.4rem; font-size: .75rem; }
.facts { font-size: .9rem; }
.facts th { color: var(--quiet); width: 16.5rem; overflow-wrap: anywhere; }
.facts td { overflow-wrap: anywhere; }
.names th { color: var(--text); width: auto; font-weight: 600; overflow-wrap: anywhere; }
.names th:first-child { width: 16.5rem; }
.prompt { margin: 0 0 1rem; overflow: hidden; break-inside: avoid; }
.question {
  max-height: 12rem; overflow: auto; padding: .7rem 1rem; background: var(--shade);
  color: var(--text); border-bottom: 1px solid var(--line);
}
.answers { font-size: .9rem; table-layout: fixed; }
.answers th:first-child { width: 7rem; color: var(--quiet); }
.answers td { white-space: pre-wrap; overflow-wrap: anywhere; }
.at { display: block; font-size: .85rem; }
summary { margin: 0 0 1rem; cursor: pointer; color: var(--quiet); }
.pair { display: flex; flex-wrap: wrap; gap: .75rem; margin-bottom: .75rem; }
.pair > * { flex: 1 1 24rem; min-width: 0; align-self: start; }
.dataset h3 { display: flex; justify-content: space-between; margin: 0; padding: .6rem 1rem; }
.dataset h3 { font-size: 1rem; border-bottom: 1px solid var(--line); }
.dataset h3 span { font-size: .85rem; font-weight: 400; }
.dataset .facts th { width: 9rem; }
.caption { margin: 0; padding: .6rem 1rem 0; font-size: .85rem; border-top: 1px solid var(--line); }
.written { margin: 2.5rem 0 0; font-size: .85rem; }
.note { border-top: 1px solid var(--line); color: var(--fault); overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .charts { grid-template-columns: 1fr; gap: .5rem; }
  .chart { padding: .7rem .75rem .6rem; }
  .wide .plot { height: 13rem; }
  h1 { font-size: 1.35rem; }
  dd b { font-size: 1.25rem; }
  .swatch { width: 1.1rem; margin-right: .3rem; }
  .minor { display: none; }
  .chart .remark { padding-left: 0; }
  .facts th, .dataset .facts th, .names th:first-child { width: 34%; }
  .answers, .answers tbody, .answers tr, .answers th, .answers td { display: block; width: auto; }
  .answers tr { padding: .3rem 0; }
  .answers tr > * { padding-top: .15rem; padding-bottom: .15rem; }
  .answers th:first-child { width: auto; }
  .answers th:empty, .answers .names { display: none; }
  .answers td.run-1, .answers td.run-2 {
    margin: .3rem .6rem; padding: 0 0 0 .6rem; border-left: 3px var(--edge) var(--own);
  }
}
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --card: #ffffff; --line: #d0d0cc; --text: #000000; --quiet: #505358;
    --run-1: #0072b2; --run-2: #d55e00; --shade: #f2f2ef; --accent: #1f7a3f;
    --trained: #cdeed6; --trained-text: #0c2e17; --fault: #9a5b00; --fault-page: #fdf1dc;
  }
  body { padding: 0; max-width: none; }
  h2 { break-after: avoid; }
  .question { max-height: none; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
