/** What runs now: in place in a terminal, a line each time elsewhere. Results go to stdout, this to stderr. */
export type Progress = Readonly<{
  /** Says what begins now. */
  now(text: string): void;
  /** Writes a line that stays. */
  note(text: string): void;
  /** The same for a part of the whole. */
  within(part: string): Progress;
  stop(): void;
}>;

const EVERY_MS = 1_000;

export function createProgress(output: NodeJS.WriteStream, prefix = ''): Progress {
  const inPlace = output.isTTY === true;
  let text = '';
  let since = performance.now();
  let timer: NodeJS.Timeout | undefined;
  const seconds = () => `${Math.round((performance.now() - since) / 1_000)} s`;
  const clear = () => inPlace && output.write('\r\x1b[2K');
  const show = () => {
    if (inPlace && text !== '')
      output.write(`\r\x1b[2K${`${prefix}${text} (${seconds()})`.slice(0, output.columns - 1)}`);
  };
  return {
    now(next) {
      text = next;
      since = performance.now();
      if (inPlace) timer ??= setInterval(show, EVERY_MS);
      if (inPlace) show();
      else output.write(`${prefix}${text}\n`);
    },
    note(line) {
      clear();
      output.write(`${prefix}${line}\n`);
      show();
    },
    within: (part) => createProgress(output, `${prefix}${part}: `),
    stop() {
      clearInterval(timer);
      timer = undefined;
      text = '';
      clear();
    },
  };
}
