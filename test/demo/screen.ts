/** What the demo shows. Lines only, no cursor movement: it reads the same in a terminal, a log file and CI. */
import { stripVTControlCharacters } from 'node:util';
import picocolors from 'picocolors';
import { type LedgerGrade, violationsOf } from './ledger.ts';

export type Shown = Readonly<{ number: number; eventType: string; who: string }>;

export type Pulse = Readonly<{
  rowsIn: number;
  entriesOut: number;
  /** Of the entries that came out since the last pulse. */
  latenciesMs: readonly number[];
  onTheirWay: number;
}>;

export type Summary = Readonly<{
  grade: LedgerGrade;
  /** Commit to reading the entry, of every event that nothing held back. */
  latenciesMs: readonly number[];
  heldBack: number;
  /** What went wrong besides, e.g. a pod that did not stop cleanly. */
  complaints: readonly string[];
}>;

export type Screen = ReturnType<typeof createScreen>;

export function createScreen(out: NodeJS.WriteStream) {
  // Not picocolors' own guess: that also colours log files when the variable CI is set.
  const { NO_COLOR, FORCE_COLOR, TERM } = process.env;
  const colours = picocolors.createColors(
    !NO_COLOR && Boolean(FORCE_COLOR || (out.isTTY && TERM !== 'dumb')),
  );
  const { bold, cyan, dim, green, red, yellow } = colours;
  const line = (text = ''): void => void out.write(`${text}\n`);
  const columns = (): number => out.columns || Number(process.env.COLUMNS) || Number.POSITIVE_INFINITY;
  /** What would be longer than the terminal is wide is cut: one line for each thing that happens. */
  const happening = (text: string): void => line(cut(text, columns()));
  const name = ({ number }: Shown): string => `#${number}`.padStart(5);
  const event = (shown: Shown): string =>
    `${name(shown)}  ${shown.eventType.padEnd(12)} ${shown.who.padEnd(18)}`;

  return {
    title(text: string): void {
      line();
      line(bold(text));
      line();
    },
    step: (text: string): void => line(`  ${green('✓')} ${text}`),
    note: (text: string): void => line(dim(`  ${text}`)),
    blank: (): void => line(),

    rowIn: (shown: Shown): void => happening(`  ${cyan('row in   ')} ${event(shown)}`),
    entryOut: (shown: Shown, latencyMs: number, remark = ''): void =>
      happening(
        `  ${green('entry out')} ${event(shown)} ${green(milliseconds(latencyMs).padStart(9))}  ${dim(remark)}`,
      ),
    pulse({ rowsIn, entriesOut, latenciesMs, onTheirWay }: Pulse): void {
      const latency =
        latenciesMs.length === 0
          ? ''
          : `p50 ${milliseconds(percentile(latenciesMs, 50))}, max ${milliseconds(Math.max(...latenciesMs))}`;
      happening(
        `  ${cyan(`${String(rowsIn).padStart(4)} rows in`)}  ${green(`${String(entriesOut).padStart(4)} entries out`)}  ` +
          `${String(onTheirWay).padStart(4)} on their way  ${green(latency)}`,
      );
    },
    failing: (shown: Shown, why: string): void =>
      happening(`  ${yellow('row in   ')} ${event(shown)} ${yellow(why)}`),
    // What was said with its row is not said again: the line has 80 columns.
    attemptFailed(shown: Shown, attempt: number, reason: string, nextInSeconds: number | undefined): void {
      const next =
        nextInSeconds === undefined ? 'no retry left' : `next try in ${nextInSeconds.toFixed(1)} s`;
      happening(
        `  ${yellow('failed   ')} ${name(shown)}  ${yellow(`attempt ${attempt}: ${next}`)}  ${dim(shorten(reason))}`,
      );
    },
    deadLetter: (shown: Shown, stream: string, attempts: string): void =>
      happening(
        `  ${red('dead     ')} ${name(shown)}  ${red(`given up after ${attempts} attempts: now in ${stream}`)}`,
      ),
    replayed: (shown: Shown, stream: string): void =>
      happening(`  ${green('replayed ')} ${name(shown)}  ${green(`its entry is in ${stream}`)}`),
    doubled: (shown: Shown): void => happening(`  ${red('DOUBLED  ')} ${event(shown)}`),

    /** What to type stands on a line of its own, to be copied: never cut. */
    toTry(title: string, what: readonly (readonly [about: string, ...commands: string[]])[]): void {
      line();
      line(bold(`  ${title}`));
      for (const [about, ...commands] of what) {
        line();
        line(dim(`  ${about}`));
        for (const command of commands) line(`    ${cyan(command)}`);
      }
      line();
    },

    error(text: string): void {
      const [first = '', ...rest] = text.split('\n');
      line();
      line(`  ${red(`✗ ${first}`)}`);
      for (const more of rest) line(`    ${more}`);
    },

    /** @returns whether the promises held */
    summary({ grade, latenciesMs, heldBack, complaints }: Summary): boolean {
      const wrong = [...violationsOf(grade), ...complaints];
      const row = (label: string, value: string, remark = ''): void =>
        happening(`    ${label.padEnd(18)} ${bold(value.padStart(8))}  ${dim(remark)}`);
      const mustBeZero = (label: string, count: number, remark: string): void =>
        happening(
          `    ${label.padEnd(18)} ${(count === 0 ? green : red)(String(count).padStart(8))}  ${dim(remark)}`,
        );

      line();
      line(bold('  What the table and the streams say'));
      row('events in', String(grade.events), 'rows committed to identity.outbox');
      row('entries out', String(grade.entries), 'in the streams');
      // Where all is well, an event has an entry or a dead letter, and both only if it was replayed.
      const replayed = Math.max(0, grade.entries + grade.deadLetters - grade.events);
      const remark = replayed > 0 && wrong.length === 0 ? `; ${replayed} of them replayed since` : '';
      row('dead letters', String(grade.deadLetters), `given up${remark}`);
      if (grade.copies > 0) row('copies', String(grade.copies), 'marked entries that you had republished');
      mustBeZero('duplicates', grade.doubled + grade.doubledDeadLetters, 'events with more than one entry');
      mustBeZero('order violations', grade.outOfOrder, 'entries behind a later event of their aggregate');
      mustBeZero('lost', grade.lost, 'events with no entry and no dead letter');
      if (latenciesMs.length > 0) {
        const behind = heldBack > 0 ? `both without the ${heldBack} held up by a failing one` : '';
        row('latency p50', milliseconds(percentile(latenciesMs, 50)), 'from commit to reading the entry');
        row('latency p99', milliseconds(percentile(latenciesMs, 99)), behind);
      }
      line();
      if (wrong.length === 0) {
        const { events, entries, deadLetters } = grade;
        line(
          `  ${bold(green('✓ The promises held.'))} ${count(events, 'event')}: ${count(entries, 'entry', 'entries')}, ${count(deadLetters, 'dead letter')};`,
        );
        line('    nothing lost, twice or out of order.');
      } else {
        line(`  ${bold(red('✗ The promises did not hold:'))}`);
        for (const text of wrong) line(`    ${red(text)}`);
      }
      line();
      return wrong.length === 0;
    },
  };
}

const count = (number: number, one: string, many = `${one}s`): string =>
  `${number} ${number === 1 ? one : many}`;

/** Colours stay: one that begins before the cut also ends. */
function cut(text: string, width: number): string {
  if (stripVTControlCharacters(text).length <= width) return text;
  let seen = 0;
  // biome-ignore lint/suspicious/noControlCharactersInRegex: colours begin with one
  return text.replaceAll(/\x1b\[\d+m|./gs, (it) => {
    if (it.length > 1) return it;
    seen++;
    return seen < width ? it : seen === width ? '…' : '';
  });
}

/** The nearest rank; of no values, NaN. */
export function percentile(values: readonly number[], percent: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil((percent / 100) * sorted.length) - 1)] ?? Number.NaN;
}

/** Of an error of Redis its code. */
const shorten = (reason: string): string => /^[A-Z]+\b/.exec(reason)?.[0] ?? reason;

function milliseconds(value: number): string {
  return value < 100 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`;
}
