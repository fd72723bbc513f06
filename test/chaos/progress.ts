import { succeedsWithin } from '../../src/lifecycle.ts';
import { PROBE_TOPIC, TOPICS } from './topics.ts';
import { STREAM, type World } from './world.ts';

const IN_PLACE_EVERY_MS = 500;
const LINE_EVERY_MS = 5_000;
/** A look that takes longer is shown with what was seen before: the servers hang on purpose. */
const LOOK_DEADLINE_MS = 1_000;

export type Progress = Readonly<{
  /** Writes a line that stays. */
  note(text: string): void;
  watch(world: World, underWay: () => readonly string[]): void;
  stop(): void;
}>;

/** Shows how the run goes: in place in a terminal, otherwise a line every few seconds. */
export function createProgress(output: NodeJS.WriteStream): Progress {
  const inPlace = output.isTTY === true;
  const startedAt = performance.now();
  let timer: NodeJS.Timeout | undefined;
  const seen = { streams: 0, unpublished: 0, dead: 0 };

  const at = (): string => `${((performance.now() - startedAt) / 1_000).toFixed(1).padStart(6)} s`;

  async function look({ sql, client }: World): Promise<void> {
    const [rows] = await sql<{ unpublished: string; dead: string }>(
      `SELECT count(*) FILTER (WHERE dead_lettered_at IS NULL) AS unpublished, count(dead_lettered_at) AS dead
         FROM identity.outbox WHERE NOT published`,
    );
    const streams = [...TOPICS, PROBE_TOPIC].map((topic) => client.xlen(topic ?? STREAM));
    seen.streams = (await Promise.all(streams)).reduce((sum, length) => sum + length, 0);
    seen.unpublished = Number(rows?.unpublished);
    seen.dead = Number(rows?.dead);
  }

  async function show(world: World, underWay: () => readonly string[]): Promise<void> {
    const fresh = await succeedsWithin(LOOK_DEADLINE_MS, look(world));
    if (timer === undefined) return;
    const { committed } = world.workload.counts();
    const text =
      `${at()}  written ${committed}, in streams ${seen.streams}, on their way ${seen.unpublished}, ` +
      `dead ${seen.dead}${fresh ? '' : ' (no answer)'}  ${underWay().join(' + ')}`;
    output.write(inPlace ? `\r\x1b[2K${text.slice(0, output.columns - 1)}` : `${text}\n`);
    timer = setTimeout(() => void show(world, underWay), inPlace ? IN_PLACE_EVERY_MS : LINE_EVERY_MS);
  }

  return {
    note: (text) => void output.write(`${inPlace ? '\r\x1b[2K' : ''}${at()}  ${text}\n`),
    watch(world, underWay) {
      timer = setTimeout(() => void show(world, underWay), IN_PLACE_EVERY_MS);
    },
    stop() {
      clearTimeout(timer);
      timer = undefined;
      if (inPlace) output.write('\r\x1b[2K');
    },
  };
}
