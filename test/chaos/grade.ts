/** The result on a run, from the table, the streams and the dead-letter stream alone. */
import { gradeLedger, type LedgerGrade, type Violation } from '../demo/ledger.ts';
import { mayDie } from './topics.ts';
import { DLQ, STREAM, type World } from './world.ts';

/** What is counted, and how it reads as the head of a column. */
export const GRADES = {
  lost: 'lost',
  doubled: 'doubled',
  outOfOrder: 'out of order',
  publishedWithoutEntry: 'no entry',
  deadWithoutDlq: 'no dead letter',
  doubledDeadLetters: 'dead twice',
  leftBehind: 'left behind',
  healthyDead: 'healthy dead',
  unknown: 'unknown',
} as const satisfies Record<Violation | 'healthyDead', string>;

export type GradeName = keyof typeof GRADES;
export const GRADE_NAMES = Object.keys(GRADES) as GradeName[];

/** Event ids by kind of violation. */
export type Grade = Readonly<Record<GradeName, readonly string[]>>;

export async function gradeWorld(world: World): Promise<Grade> {
  const found = await readLedger(world);
  return {
    ...found,
    doubled: [...new Set([...world.erased.doubled, ...found.doubled])],
    outOfOrder: [...new Set([...world.erased.outOfOrder, ...found.outOfOrder])],
    lost: [...found.lost, ...(await missingRows(world))],
    healthyDead: await healthyDead(world),
  };
}

/**
 * Before the streams are emptied: what their readers have seen of them so far is judged now, or never. Only what a
 * stream shows by itself counts, since the relay is at work.
 */
export async function judgeBeforeErasing(world: World): Promise<void> {
  const { doubled, outOfOrder } = await readLedger(world);
  world.erased.doubled.push(...doubled);
  world.erased.outOfOrder.push(...outOfOrder);
}

async function readLedger({ admin: pool, client: redis, forgotten }: World): Promise<LedgerGrade['samples']> {
  const { samples } = await gradeLedger({
    ...{ pool, redis, defaultStream: STREAM, dlqStream: DLQ },
    samples: Number.POSITIVE_INFINITY,
  });
  // Of a row that PostgreSQL forgot an entry may remain. Where its producer writes it again, that is another event.
  const isKept = (eventId: string) => !forgotten.has(eventId);
  const { unknown, doubled, doubledDeadLetters } = samples;
  return {
    ...samples,
    unknown: unknown.filter(isKept),
    doubled: doubled.filter(isKept),
    doubledDeadLetters: doubledDeadLetters.filter(isKept),
  };
}

/** What is new since an earlier grade: in a run that grades after each fault, each answers for itself only. */
export function since(before: Grade | undefined, now: Grade): Grade {
  if (before === undefined) return now;
  const isNew = (name: GradeName): readonly string[] => {
    const known = new Set(before[name]);
    return now[name].filter((eventId) => !known.has(eventId));
  };
  return Object.fromEntries(GRADE_NAMES.map((name) => [name, isNew(name)])) as unknown as Grade;
}

export const isClean = (grade: Grade): boolean => GRADE_NAMES.every((name) => grade[name].length === 0);

/** Events whose commit was answered, and that are in no row: would be PostgreSQL's fault, or the harness'. */
async function missingRows({ sql, workload, forgotten }: World): Promise<string[]> {
  const rows = await sql<{ event_id: string }>('SELECT event_id::text FROM identity.outbox');
  const present = new Set(rows.map((row) => row.event_id));
  return [...workload.committed()].filter((eventId) => !present.has(eventId) && !forgotten.has(eventId));
}

/** Dead rows, and dead letters of whatever row, of events that nothing was wrong with. */
async function healthyDead({ sql, client }: World): Promise<string[]> {
  const dead = await sql<{ event_id: string; topic: string }>(
    `SELECT event_id::text, coalesce(topic, $1) AS topic FROM identity.outbox WHERE dead_lettered_at IS NOT NULL`,
    [STREAM],
  );
  const letters = (await client.xrange(DLQ, '-', '+')).map(([, fields]) => ({
    event_id: field(fields, 'original_event_id'),
    topic: field(fields, 'topic'),
  }));
  const healthy = [...dead, ...letters].filter(({ topic }) => !mayDie(topic));
  return [...new Set(healthy.map(({ event_id }) => event_id))];
}

function field(fields: readonly string[], name: string): string {
  const at = fields.findIndex((text, index) => index % 2 === 0 && text === name);
  return at === -1 ? '' : (fields[at + 1] ?? '');
}
