import { GRADE_NAMES, GRADES } from './grade.ts';
import type { Injection, RunResult } from './run.ts';
import type { Scheduled } from './schedule.ts';

const HEAD = ['fault', 'times', 'recovery median', 'worst'] as const;

/** What is to come, a line each. */
export function schedulePlan(schedule: readonly Scheduled[], each: boolean): string[] {
  return schedule.map(({ atMs, fault }) => {
    const at = each ? '' : `${(atMs / 1_000).toFixed(1).padStart(7)} s  `;
    return `${at}${fault.name.padEnd(36)} ${fault.describe}`;
  });
}

/** The table of a run, in Markdown: a row for each fault, and one for everything. */
export function reportTable({ injections, grade }: RunResult): string[] {
  const names = [...new Set(injections.map(({ fault }) => fault.name))];
  const byName = (name: string) => injections.filter(({ fault }) => fault.name === name);
  const rows = names
    .map((name) => [name, byName(name)] as const)
    .map(([name, ofFault]) => [
      name,
      timesOf(ofFault),
      ...recoveriesOf(ofFault),
      // Faults that overlap answer together, in the last row.
      ...GRADE_NAMES.map((kind) => {
        const known = ofFault.flatMap((injection) => injection.grade ?? []);
        return known.length === 0 ? '' : String(known.reduce((sum, of) => sum + of[kind].length, 0));
      }),
    ]);
  const everything = [
    'everything',
    timesOf(injections),
    ...recoveriesOf(injections),
    ...GRADE_NAMES.map((kind) => String(grade[kind].length)),
  ];
  return aligned([[...HEAD, ...GRADE_NAMES.map((kind) => GRADES[kind])], ...rows, everything]);
}

function timesOf(injections: readonly Injection[]): string {
  const done = injections.filter((injection) => injection.error === undefined).length;
  return done === injections.length ? String(done) : `${done} of ${injections.length}`;
}

/** Median and worst. */
function recoveriesOf(injections: readonly Injection[]): [string, string] {
  const times = injections
    .filter((injection) => injection.error === undefined)
    .map((injection) => injection.recoveryMs ?? Number.POSITIVE_INFINITY)
    .sort((a, b) => a - b);
  return [seconds(times[Math.floor((times.length - 1) / 2)]), seconds(times.at(-1))];
}

function seconds(ms: number | undefined): string {
  if (ms === undefined) return '–';
  return Number.isFinite(ms) ? `${(ms / 1_000).toFixed(1)} s` : 'never';
}

function aligned(rows: readonly (readonly string[])[]): string[] {
  const [head = []] = rows;
  const widths = head.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
  const line = (row: readonly string[]): string =>
    `| ${row.map((cell, column) => (column === 0 ? cell.padEnd(widths[0] ?? 0) : cell.padStart(widths[column] ?? 0))).join(' | ')} |`;
  const rule = `|${widths.map((width, column) => (column === 0 ? '-'.repeat(width + 2) : `${'-'.repeat(width + 1)}:`)).join('|')}|`;
  return [line(head), rule, ...rows.slice(1).map(line)];
}
