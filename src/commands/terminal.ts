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

/** Lines in place of those that were printed before. Home, and what is below erased: a cleared screen would flicker. */
export function printInPlace(lines: readonly Text[]): void {
  process.stdout.write(`\x1b[H${lines.map((line) => `${line.value}\x1b[K\n`).join('')}\x1b[J`);
}

export const isTerminal = (): boolean => process.stdout.isTTY === true;

/** Columns of the terminal; where there is none, of COLUMNS, or so many that lines can still be read. */
export const columns = (): number => process.stdout.columns || Number(process.env.COLUMNS) || 120;

/** The text in so many columns. */
export function cut(value: Printable, width = columns()): Text {
  const whole = text`${value}`;
  if (whole.length <= width) return whole;
  return whole.with((it) => `${[...it.replaceAll(COLOURS, '')].slice(0, Math.max(1, width - 1)).join('')}…`);
}

/** Cells in columns, each as wide as its widest; lines fit the terminal. */
export function table(rows: readonly (readonly Printable[])[], width = columns()): Text[] {
  const cells = rows.map((row) => row.map((cell) => text`${cell}`));
  const widths: number[] = [];
  for (const row of cells)
    for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length);
  return cells.map((row) =>
    cut(
      joined(
        row.map((cell, i) =>
          i === row.length - 1 ? cell : text`${cell}${' '.repeat((widths[i] ?? 0) - cell.length)}`,
        ),
        '  ',
      ),
      width,
    ),
  );
}

type Paint = 'bold' | 'red' | 'yellow';

/** Colours, where a person sees them. */
export function colours(): Record<Paint, (it: Printable) => Text> {
  const of = picocolors.createColors(isTerminal() && !process.env.NO_COLOR);
  const paint = (name: Paint) => (it: Printable) => text`${it}`.with(of[name]);
  return { bold: paint('bold'), red: paint('red'), yellow: paint('yellow') };
}

/** A time with its zone, to the second. `iso`: in UTC. */
export const toSecond = (iso: string): string => iso.replace(/\.\d+(?=Z$)/, '');
