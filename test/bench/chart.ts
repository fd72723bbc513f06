/**
 * A bar for each contender, as SVG: its median, with a line from the least to the most of its rounds. It brings its
 * own ground: a page's colours are not always those that its reader prefers.
 */
import { rounded } from './report.ts';
import { type Figure, median } from './scenario.ts';

const WIDTH = 880;
const LABEL_WIDTH = 310;
const VALUE_WIDTH = 150;
const ROW_HEIGHT = 34;
const BAR_HEIGHT = 20;
const HEAD_HEIGHT = 44;
const FOOT_LINE_HEIGHT = 16;

/** @param figures all of one unit; the first is the one that the chart is about */
export function barChart(title: string, figures: readonly Figure[], footnotes: readonly string[]): string {
  const rows = figures.toSorted((a, b) => median(b.values) - median(a.values));
  const most = Math.max(...rows.flatMap((it) => it.values));
  const scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / most;
  const height = HEAD_HEIGHT + rows.length * ROW_HEIGHT + footnotes.length * FOOT_LINE_HEIGHT + 16;
  const bars = rows.map((figure, i) => {
    const y = HEAD_HEIGHT + i * ROW_HEIGHT;
    const middle = y + ROW_HEIGHT / 2;
    const length = median(figure.values) * scale;
    const [least, top] = [Math.min(...figure.values) * scale, Math.max(...figure.values) * scale];
    const end = LABEL_WIDTH + Math.max(length, top) + 8;
    return [
      `<text x="${LABEL_WIDTH - 10}" y="${middle + 5}" text-anchor="end">${escaped(figure.name)}</text>`,
      `<rect class="${figure === figures[0] ? 'own' : 'other'}" x="${LABEL_WIDTH}" y="${middle - BAR_HEIGHT / 2}" width="${fixed(Math.max(length, 1))}" height="${BAR_HEIGHT}" rx="2"/>`,
      `<path class="spread" d="M${fixed(LABEL_WIDTH + least)} ${middle}H${fixed(LABEL_WIDTH + top)}"/>`,
      `<text x="${fixed(end)}" y="${middle + 5}">${rounded(Math.round(median(figure.values)))} ${escaped(figure.unit)}</text>`,
    ].join('\n');
  });
  const footTop = HEAD_HEIGHT + rows.length * ROW_HEIGHT + FOOT_LINE_HEIGHT + 4;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img" aria-label="${escaped(title)}">
<style>
.page { fill: #ffffff; stroke: #d1d9e0; }
text { font: 14px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 16px; }
.foot { font-size: 11px; fill: #59636e; }
.own { fill: #0969da; }
.other { fill: #afb8c1; }
.spread { stroke: #1f2328; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d; }
text { fill: #e6edf3; }
.foot { fill: #9198a1; }
.own { fill: #4493f8; }
.other { fill: #57606a; }
.spread { stroke: #e6edf3; }
}
</style>
<rect class="page" x="0.5" y="0.5" width="${WIDTH - 1}" height="${height - 1}" rx="6"/>
<text class="title" x="10" y="26">${escaped(title)}</text>
${bars.join('\n')}
${footnotes.map((line, i) => `<text class="foot" x="10" y="${footTop + i * FOOT_LINE_HEIGHT}">${escaped(line)}</text>`).join('\n')}
</svg>
`;
}

const fixed = (n: number) => n.toFixed(1);

const escaped = (text: string) =>
  text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;').replaceAll('"', '&quot;');
