/**
 * The outbox in PostgreSQL, beside a model of everything else: BullMQ's jobs, the workers that have them in hand, the
 * stream. Its steps are what can happen to a relay; after each, what has to be true is asserted.
 */
import { randomUUID } from 'node:crypto';
import type pg from 'pg';
import { expect } from 'vitest';
import type { AppendOutcome, OutboxEvent, Receipt } from '../../src/event.ts';
import { type Queryable, transaction } from '../../src/outbox/database.ts';
import type { Aggregate } from '../../src/outbox/outbox.ts';
import { createDeadLetter, type Failure } from '../../src/triage/dead-letter.ts';
import { createReconcile } from '../../src/triage/reconcile.ts';
import { anEvent, insertEvents } from './events.ts';
import { createInterleaving, type Hands, type Operation } from './interleaved.ts';
import { createJobs, type Known } from './jobs-model.ts';
import { outboxOf, type Policy, STATEMENT_TIMEOUT_MS } from './outbox-adapter.ts';
import { createInvariants, name, names } from './outbox-invariants.ts';
import { type AdminPool, readRows, silent } from './stages.ts';

export const AGGREGATES = 3;
/** Failed attempts after which a job has failed. */
const MAX_ATTEMPTS = 2;

type Worker = {
  readonly event: OutboxEvent;
  readonly token: number;
  receipt: Receipt | undefined;
  acknowledgement: 'none' | 'running' | 'done';
};

type Handler = () => Promise<void>;

export type Road = (n: number) => Promise<string>;

export type World = Awaited<ReturnType<typeof createWorld>>;

/** Everything but inserts is the relay's. */
export type Pools = Readonly<{ admin: AdminPool; relay: pg.Pool; producers: pg.Pool }>;

export async function createWorld({ admin, relay, producers }: Pools, policy: Policy) {
  await admin.query('TRUNCATE identity.outbox RESTART IDENTITY');
  const interleaving = createInterleaving(admin);
  const users: string[] = Array.from({ length: AGGREGATES }, () => randomUUID());
  const known = new Map<string, Known>();
  const of = (eventId: string) => known.get(eventId) as Known;
  const jobs = createJobs(of, (event) => invariants.assertInOrder(event));
  const invariants = createInvariants(admin, policy, known, jobs.all);
  let workers: Worker[] = [];
  let handlers: { name: string; run: Handler }[] = [];
  const watched = new Map<string, Aggregate>();
  const writing = new Set<number>();
  /** What happened, as a reader would write it down. */
  const script: string[] = [];
  let counter = 0;
  let replays = 0;

  const deadLetterBy = ({ pool: hands }: Hands, beforeCommit: () => Promise<void>) =>
    createDeadLetter({
      append: jobs.appendDeadLetter,
      markDead: (dead) =>
        outboxOf(hands, policy).bury(dead, async (successors) => {
          jobs.add(successors);
          await beforeCommit();
        }),
      onDead: (event) => watch([event]),
      logger: silent,
    });

  function watch(aggregates: readonly Aggregate[]): void {
    for (const { aggregateType, aggregateId } of aggregates)
      watched.set(aggregateId, { aggregateType, aggregateId });
  }

  /** Starts `work`; unless it is to stay open, it is committed at once. Returns how that went. */
  async function perform(
    title: string,
    open: boolean,
    work: (hands: Hands) => Promise<void>,
    by = relay,
  ): Promise<string> {
    const label = String.fromCharCode('A'.charCodeAt(0) + (counter++ % 26));
    const operation = await interleaving.start(label, by, (hands) =>
      work(open ? hands : { ...hands, commitWhenTold: async () => {} }),
    );
    return `${title}${open ? ` as ${label}` : ''}${fateOf(operation)}`;
  }

  function fateOf(operation: Operation): string {
    if (operation.error) return `: rolled back (${operation.error.message || operation.error.name})`;
    if (operation.state === 'running') return ': waits for a lock';
    return '';
  }

  const pick = <T>(list: readonly T[], n: number) => list[n % list.length] as T;
  const withReceipt = () => workers.filter((it) => it.receipt && it.acknowledgement === 'none');
  const unappended = () => workers.filter((it) => !it.receipt);

  const can = {
    insert: (aggregate: number) => !writing.has(aggregate),
    overlap: () => interleaving.unfinished() < 5,
    end: () => interleaving.open().length > 0,
    start: () => jobs.inState('waiting').length > 0,
    append: () => unappended().length > 0,
    acknowledge: () => withReceipt().length > 0,
    complete: () => workers.some((it) => it.acknowledgement === 'done'),
    handle: () => handlers.length > 0,
    stall: () => jobs.inState('active').length > 0,
    retry: () => jobs.inState('delayed').length > 0,
    lose: () => jobs.all().length > 0,
    release: () => watched.size > 0,
    crash: () => workers.length + handlers.length > 0,
  };

  const steps = {
    async insert(aggregate: number, poisonous: boolean, open: boolean): Promise<string> {
      const aggregateId = users[aggregate] as string;
      const { eventId } = anEvent();
      const event: Known = {
        ...{ id: '?', eventId, aggregateId, poisonous, committed: false, entries: [], deadLetters: 0 },
        ...{ replay: 0, skipped: false, attempts: 0 },
      };
      let id = '?';
      writing.add(aggregate);
      const done = await perform(
        `insert`,
        open,
        async ({ pool: hands, commitWhenTold }) => {
          try {
            await transaction(hands, STATEMENT_TIMEOUT_MS, 'durable', async (tx) => {
              [id = '?'] = await insertEvents(tx, [anEvent({ eventId, aggregateId, eventType: 'Happened' })]);
              // Known before its commit: it may be seen as soon as that is through.
              known.set(eventId, { ...event, id });
              await commitWhenTold();
              of(eventId).committed = true;
            });
          } catch (error) {
            known.delete(eventId);
            throw error;
          } finally {
            writing.delete(aggregate);
          }
        },
        producers,
      );
      return `${done}: e${id} of aggregate ${aggregate}${poisonous ? ', poisonous' : ''}`;
    },

    async claim(limit: number, open: boolean): Promise<string> {
      let found = '';
      const done = await perform(`claim ${limit}`, open, async ({ pool: hands, commitWhenTold }) => {
        let parked: Aggregate[] = [];
        await outboxOf(hands, policy).claim(limit, async (claim) => {
          found = `: leases ${names(claim.leased)}, parks ${claim.parked.length}`;
          jobs.add(claim.leased);
          parked = claim.parked;
          await commitWhenTold();
        });
        watch(parked);
      });
      return done + found;
    },

    async end(n: number, how: 'commit' | 'crash'): Promise<string> {
      const operation = pick(interleaving.open(), n);
      await interleaving.end(operation, how);
      return `${how} ${operation.name}${how === 'commit' ? fateOf(operation) : ''}`;
    },

    async start(n: number): Promise<string> {
      const job = pick(jobs.inState('waiting'), n);
      job.state = 'active';
      job.token = ++counter;
      workers.push({ event: job.event, token: job.token, receipt: undefined, acknowledgement: 'none' });
      return `start ${name(job.event)}`;
    },

    async append(n: number, refused: boolean): Promise<string> {
      const worker = pick(unappended(), n);
      const { event } = worker;
      const job = jobs.get(event.eventId);
      const outcome: AppendOutcome =
        refused && job && !job.entryId ? { status: 'refused', reason: 'no' } : await jobs.appendOnce(event);
      if (outcome.status === 'appended' || outcome.status === 'already-appended') {
        worker.receipt = { id: event.id, entryId: outcome.entryId };
        return `append ${name(event)}: ${outcome.status}`;
      }
      workers = workers.filter((it) => it !== worker);
      // BullMQ lets only the worker that holds the job's lock move it.
      if (outcome.status !== 'refused' || job?.state !== 'active' || job.token !== worker.token)
        return `append ${name(event)}: ${outcome.status}`;
      job.attemptsMade++;
      job.reason = outcome.reason;
      const attempts = event.attempts + job.attemptsMade;
      if (attempts < MAX_ATTEMPTS) {
        job.state = 'delayed';
        handlers.push({
          name: `record the failure of ${name(event)}`,
          run: async () => {
            const failure = { id: event.id, attempts, reason: job.reason, retryInMs: 60_000 };
            await perform('', false, ({ pool: hands }) => outboxOf(hands, policy).recordFailure(failure));
          },
        });
      } else {
        job.state = 'failed';
        const failure: Failure = { event, attempts, reason: job.reason, failedAt: new Date() };
        handlers.push({
          name: `dead-letter ${name(event)}`,
          run: async () => {
            await perform('', true, (hands) => deadLetterBy(hands, hands.commitWhenTold)(failure));
          },
        });
      }
      return `append ${name(event)}: refused, ${job.state}`;
    },

    async acknowledge(mask: number, open: boolean): Promise<string> {
      const able = withReceipt();
      const some = able.filter((_, i) => (mask >> i) & 1);
      const batch = some.length > 0 ? some : able.slice(0, 1);
      for (const worker of batch) worker.acknowledgement = 'running';
      let found = '';
      const title = `acknowledge ${names(batch.map((it) => it.event))}`;
      const done = await perform(title, open, async ({ pool: hands, commitWhenTold }) => {
        let successors: OutboxEvent[] = [];
        try {
          await outboxOf(hands, policy).acknowledge(
            batch.map((it) => it.receipt as Receipt),
            async (promoted) => {
              found = `: leases ${names(promoted)}`;
              successors = promoted;
              jobs.add(promoted);
              await commitWhenTold();
            },
          );
        } catch (error) {
          for (const worker of batch) worker.acknowledgement = 'none';
          throw error;
        }
        for (const worker of batch) worker.acknowledgement = 'done';
        const continued = new Set(successors.map((it) => it.aggregateId));
        watch(batch.map((it) => it.event).filter((it) => !continued.has(it.aggregateId)));
      });
      return done + found;
    },

    async complete(n: number): Promise<string> {
      const worker = pick(
        workers.filter((it) => it.acknowledgement === 'done'),
        n,
      );
      workers = workers.filter((it) => it !== worker);
      const job = jobs.get(worker.event.eventId);
      if (job?.state === 'active' && job.token === worker.token) jobs.complete(worker.event.eventId);
      return `complete ${name(worker.event)}`;
    },

    async handle(n: number): Promise<string> {
      const handler = pick(handlers, n);
      handlers = handlers.filter((it) => it !== handler);
      await handler.run();
      return handler.name;
    },

    /** A pod dies: what one of its workers had in hand stays where it is. */
    async crash(n: number): Promise<string> {
      const victim = pick([...workers, ...handlers], n);
      workers = workers.filter((it) => it !== victim);
      handlers = handlers.filter((it) => it !== victim);
      return `crash: ${'run' in victim ? victim.name : `the worker of ${name(victim.event)}`} is gone`;
    },

    async stall(n: number): Promise<string> {
      const job = pick(jobs.inState('active'), n);
      Object.assign(job, { state: 'waiting', token: 0 });
      return `${name(job.event)} is found stalled`;
    },

    async retry(n: number): Promise<string> {
      const job = pick(jobs.inState('delayed'), n);
      job.state = 'waiting';
      return `the retry of ${name(job.event)} is due`;
    },

    async lose(n: number): Promise<string> {
      const job = pick(jobs.all(), n);
      jobs.forget(job.event.eventId);
      return `the job of ${name(job.event)} is lost`;
    },

    async loseAll(): Promise<string> {
      for (const job of jobs.all()) jobs.forget(job.event.eventId);
      return perform('every job is lost, and leases end', false, async ({ pool: hands }) => {
        await outboxOf(hands, policy).jobsAreLost();
      });
    },

    /** The row's time is up; of one row, or of all. A row that a transaction has in hand is passed over. */
    async time(n: number | 'all'): Promise<string> {
      const { rows: ended } = await admin.query<{ id: string }>(
        `UPDATE identity.outbox o SET next_attempt_at = now() - interval '1 second'
         FROM (SELECT id FROM identity.outbox WHERE NOT published AND next_attempt_at > now() AND next_attempt_at < 'infinity'
               ORDER BY id OFFSET $1 LIMIT $2 FOR UPDATE SKIP LOCKED) leased
         WHERE o.id = leased.id RETURNING o.id::text`,
        n === 'all' ? [0, null] : [n, 1],
      );
      return `the lease of ${names(ended)} ends`;
    },

    async reconcile(open: boolean): Promise<string> {
      return perform('reconcile', open, async (hands) => {
        const { due } = outboxOf(hands.pool, policy);
        const reconcile = createReconcile<Queryable>({
          ...due,
          transaction: (work) =>
            due.transaction(async (tx) => {
              const result = await work(tx);
              await hands.commitWhenTold();
              return result;
            }),
          jobFate: async (eventId) => {
            const state = jobs.get(eventId)?.state;
            return state === undefined ? 'missing' : state === 'failed' ? 'failed' : 'alive';
          },
          failedJob: async (eventId) => {
            const job = jobs.get(eventId);
            if (job?.state !== 'failed') return null;
            const { event, reason } = job;
            return { event, attempts: event.attempts + job.attemptsMade, reason, failedAt: new Date() };
          },
          appended: async (rows) =>
            new Map(
              rows.flatMap(({ eventId }) => {
                const entryId = of(eventId).entries.at(-1);
                return entryId === undefined ? [] : [[eventId, { entryId }]];
              }),
            ),
          settle: (receipts) =>
            outboxOf(hands.pool, policy).acknowledge([...receipts], async (successors) =>
              jobs.add(successors),
            ),
          deadLetter: deadLetterBy(hands, async () => {}),
          logger: silent,
        });
        await reconcile();
      });
    },

    async release(): Promise<string> {
      const aggregates = [...watched.values()];
      watched.clear();
      return perform('look for orphans', false, async ({ pool: hands }) => {
        await outboxOf(hands, policy).release(aggregates);
      });
    },

    sweep: () => perform('sweep', false, ({ pool: hands }) => outboxOf(hands, policy).sweep()),

    /** As the README has it: the dead rows of an aggregate, in one statement. */
    async replay(aggregate: number): Promise<string> {
      const replay = ++replays;
      const deadRows = `UPDATE identity.outbox SET dead_lettered_at = NULL, next_attempt_at = NULL, attempts = 1
        WHERE dead_lettered_at IS NOT NULL AND NOT published AND aggregate_id = $1 RETURNING id::text, event_id`;
      let replayed: { id: string; event_id: string }[] = [];
      const done = await perform('replay', false, async ({ pool: hands }) => {
        replayed = (await hands.query(deadRows, [users[aggregate]])).rows;
        for (const row of replayed) Object.assign(of(row.event_id), { replay, attempts: 1 });
      });
      return `${done} ${names(replayed)}`;
    },

    /** As the README has it. */
    async skip(aggregate: number): Promise<string> {
      const firstDead = `UPDATE identity.outbox SET published = true, published_at = now(), next_attempt_at = NULL
        WHERE id = (SELECT min(id) FROM identity.outbox WHERE dead_lettered_at IS NOT NULL AND NOT published
                    AND aggregate_id = $1) RETURNING id::text, event_id`;
      let skipped: { id: string; event_id: string }[] = [];
      const done = await perform('skip', false, async ({ pool: hands }) => {
        skipped = (await hands.query(firstDead, [users[aggregate]])).rows;
        for (const row of skipped) of(row.event_id).skipped = true;
      });
      return `${done} ${names(skipped)}`;
    },
  };

  const road = (): Road[] => [
    ...(can.end() ? [(n: number) => steps.end(n, 'commit')] : []),
    ...(can.start() ? [steps.start] : []),
    ...(can.append() ? [(n: number) => steps.append(n, n % 4 === 3)] : []),
    ...(can.acknowledge() && can.overlap() ? [(n: number) => steps.acknowledge(n, n % 2 === 1)] : []),
    ...(can.complete() ? [steps.complete] : []),
    ...(can.handle() && can.overlap() ? [steps.handle] : []),
    ...(can.retry() ? [steps.retry] : []),
  ];

  return {
    ...{ policy, road, can, steps, script, known },
    assertInvariants: invariants.assertInvariants,
    rows: () => readRows(admin),
    commitAll: async () => {
      while (interleaving.open().length > 0) await steps.end(0, 'commit');
      expect(interleaving.unfinished(), 'transactions that wait for nobody').toBe(0);
    },
    /** Nobody works on anything any more; every wait has come to its end. */
    forgetHands() {
      workers = [];
      handlers = [];
      watched.clear();
      for (const job of jobs.all())
        if (job.state !== 'failed') Object.assign(job, { state: 'waiting', token: 0 });
    },
    abandon: interleaving.abandon,
  };
}
