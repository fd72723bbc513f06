/** What a failed test leaves, so that it is understood without a second run. */
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Redis } from 'ioredis';
import type { Pool } from 'pg';
import { inject, type TestContext } from 'vitest';
import { withDeadline } from '../../src/lifecycle.ts';
import type { Pod } from '../demo/pod.ts';

const FOLDER = '.failed';
/** Of rows, and of entries of a stream. */
const MOST = 20_000;
/** A server may be the very one that does not answer. */
const DEADLINE_MS = 10_000;
/** In the output: all that CI keeps of a run. */
const LINES_SHOWN = 15;
const CHARACTERS_SHOWN = 600;

type Stage = Readonly<{
  pool: Pick<Pool, 'query'>;
  redis: Pick<Redis, 'info' | 'xrange'>;
  streams: readonly string[];
  pods: readonly Pick<Pod, 'pid' | 'lines'>[];
}>;

/** Writes pods' logs, rows and streams to `.failed/<test>/`, and the latest log lines to the output. */
export async function keepWhatFailed(
  { task }: TestContext,
  { pool, redis, streams, pods }: Stage,
): Promise<void> {
  const folder = join(inject('root'), FOLDER, task.name.replaceAll(/[^\p{L}\d]+/gu, '-').slice(0, 80));
  await rm(folder, { recursive: true, force: true });
  await mkdir(folder, { recursive: true });
  const write = async (name: string, text: () => string | Promise<string>) => {
    const what = await withDeadline(DEADLINE_MS, Promise.resolve().then(text)).catch(String);
    await writeFile(join(folder, name), `${what}\n`);
  };
  const rows = async () => {
    const found = await pool.query(`SELECT * FROM identity.outbox ORDER BY outbox.id DESC LIMIT ${MOST}`);
    return found.rows.map((row) => JSON.stringify(row)).join('\n');
  };
  const entries = async (stream: string) => {
    const found = await redis.xrange(stream, '-', '+', 'COUNT', MOST);
    return found.map((entry) => JSON.stringify(entry)).join('\n');
  };
  await Promise.all([
    ...pods.map((pod) => write(`pod-${pod.pid}.log`, () => pod.lines.join('\n'))),
    write('rows.jsonl', rows),
    write('redis-info.txt', () => redis.info()),
    ...streams.map((stream) => write(`${encodeURIComponent(stream)}.jsonl`, () => entries(stream))),
  ]);
  const shown = pods.flatMap(({ pid, lines }) => [
    `the latest of ${lines.length} lines of process ${pid}:`,
    ...lines.slice(-LINES_SHOWN).map((line) => line.slice(0, CHARACTERS_SHOWN)),
  ]);
  console.error(['', `Logs, rows and streams of "${task.name}" are in ${folder}`, ...shown, ''].join('\n'));
}
