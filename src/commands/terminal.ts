import picocolors from 'picocolors';
import { printable, printableJson } from '../config/printable.ts';

/**
 * The only way to the terminal: what is printed is a Text, and whatever a Text is made of is cleaned, but for the words
 * that stand in the source. See config/printable.ts.
 */

/** Words that may be printed as they are. */
export class Text {
  readonly value: string;

  private constructor(value: string) {
    this.value = value;
  }

  static of(strings: TemplateStringsArray, ...values: readonly Printable[]): Text {
    return new Text(String.raw({ raw: strings }, ...values.map(cleaned)));
  }

  /** Paints or cuts what is clean already. */
  with(change: (value: string) => string): Text {
    return new Text(change(this.value));
  }

  /** As it is seen, without colours. */
  get length(): number {
    return [...this.value.replaceAll(COLOURS, '')].length;
  }
}

/** What a shell reports of a program that SIGPIPE has ended. */
const EXIT_PIPE = 141;

/**
 * For commands that print: when the reader of the output goes, as `| head` does, the command ends without a word, as other
 * programs do. Where the output goes to a full disk, it says so. Not for a pod, which only logs: where stdout is a pipe,
 * Node.js would make it one that does not block, and a log line that finds it full would hold up the pod.
 */
export function endWithTheReader(): void {
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') process.exit(EXIT_PIPE);
    printError(text`relay: the output cannot be written: ${error.message}`);
    process.exit(1);
  });
}

export type Printable = string | number | Text;

// biome-ignore lint/suspicious/noControlCharactersInRegex: our own colours begin with one
const COLOURS = /\x1b\[[\d;]*m/g;

const cleaned = (value: Printable): string =>
  value instanceof Text ? value.value : printable(String(value));

/** Template tag: text`Replayed ${count} of ${topic}.` */
export const text = Text.of;

export const joined = (parts: readonly Printable[], between = ''): Text =>
  parts.reduce<Text>((all, part, i) => text`${all}${i === 0 ? '' : between}${part}`, text``);

export function print(line: Text): void {
  process.stdout.write(`${line.value}\n`);
}

export function printAll(lines: readonly Text[]): void {
  for (const line of lines) print(line);
}

export function printError(line: Text): void {
  process.stderr.write(`${line.value}\n`);
}

/** One JSON document on one line: the same values, whatever they hold. */
export function printJson(value: unknown): void {
  process.stdout.write(`${printableJson(JSON.stringify(value))}\n`);
}

/** What the library of commands says of the arguments, which it quotes; its own lines stay. */
export const cleanLines = (lines: string): string =>
  process.argv
    .reduce((all, argument) => all.replaceAll(argument, () => printable(argument)), lines)
    .split('\n')
    .map(printable)
    .join('\n');

/**
 * Lines in place of those that were printed before, as many as the terminal has rows for: more would scroll it. Home, and
 * what is below erased: a cleared screen would flicker.
 */
export function printInPlace(lines: readonly Text[]): void {
  const room = (process.stdout.rows || Number.POSITIVE_INFINITY) - 1; // the last row is the cursor's
  const isCut = lines.length > room;
  const shown = lines.slice(0, isCut ? Math.max(0, room - 1) : undefined).map((line) => cut(line).value);
  // A colour may go on in what is cut.
  if (isCut) shown.push(`\x1b[0m… ${lines.length - shown.length} more lines`);
  process.stdout.write(`\x1b[H${shown.map((line) => `${line}\x1b[K\n`).join('')}\x1b[J`);
}

export const isTerminal = (): boolean => process.stdout.isTTY === true;

/** Columns of the terminal. In a pipe or a file there is no such limit, unless COLUMNS sets one. */
export const columns = (): number =>
  process.stdout.columns || Number(process.env.COLUMNS) || Number.POSITIVE_INFINITY;

/** Columns for help texts: those of the terminal, and 80 where the output goes elsewhere. */
export const helpColumns = (): number => Math.max(60, process.stdout.columns || 80);

/** The text in so many columns. */
export function cut(value: Printable, width = columns()): Text {
  const whole = text`${value}`;
  if (whole.length <= width) return whole;
  return whole.with((it) => `${[...it.replaceAll(COLOURS, '')].slice(0, Math.max(1, width - 1)).join('')}…`);
}

/**
 * The line, broken where it is longer than that: between cells, which have two blanks between them, else between words. No
 * word is cut, so ids and numbers can be copied.
 */
export function folded(line: Printable, width = columns()): Text[] {
  const whole = text`${line}`;
  if (whole.length <= width) return [whole];
  const indent = `${/^ */.exec(whole.value)?.[0]}  `;
  const seen = (part: string) => whole.with(() => part).length;
  const cells = whole.value.match(/ *[^ ]+(?: [^ ]+)*/g) ?? [];
  const parts = cells.flatMap((cell) =>
    seen(indent + cell.trimStart()) <= width ? [cell] : (cell.match(/ *[^ ]+/g) ?? []),
  );
  const lines = [''];
  for (const part of parts) {
    const longer = `${lines.at(-1)}${part}`;
    if (longer === part || seen(longer) <= width) lines[lines.length - 1] = longer;
    else lines.push(indent + part.trimStart());
  }
  return lines.map((it) => whole.with(() => it));
}

/** Names that one copies are whole, also where they are wider than the terminal, but for those that are absurd. */
const NAME_COLUMNS = 100;

export const name = (of: string): Text => cut(of, Math.max(columns(), NAME_COLUMNS));

/** The lines of each row: its cells in columns, each as wide as its widest. Where that is too wide, every row is folded. */
export function tableRows(rows: readonly (readonly Printable[])[], width = columns()): Text[][] {
  const widths: number[] = [];
  for (const row of rows)
    for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, text`${cell}`.length);
  const isTooWide = widths.reduce((sum, it) => sum + it, 2 * (widths.length - 1)) > width;
  return rows.map((row) => {
    const cells = row.map((cell, i) => {
      const padding = isTooWide || i === row.length - 1 ? 0 : (widths[i] ?? 0) - text`${cell}`.length;
      return text`${cell}${' '.repeat(padding)}`;
    });
    return folded(joined(cells, '  '), width);
  });
}

export const table = (...given: Parameters<typeof tableRows>): Text[] => tableRows(...given).flat();

type Paint = 'bold' | 'red' | 'yellow';

/** Colours, where a person sees them. */
export function colours(): Record<Paint, (it: Printable) => Text> {
  const of = picocolors.createColors(isTerminal() && !process.env.NO_COLOR);
  const paint = (name: Paint) => (it: Printable) => text`${it}`.with(of[name]);
  return { bold: paint('bold'), red: paint('red'), yellow: paint('yellow') };
}

/** A time with its zone, to the second. `iso`: in UTC. */
export const toSecond = (iso: string): string => iso.replace(/\.\d+(?=Z$)/, '');

/** In the largest unit that says enough. */
export function duration(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1_000)} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7_200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3_600)} h` : `${Math.round(seconds / 86_400)} d`;
}
