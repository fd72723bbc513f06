import { setTimeout as delay } from 'node:timers/promises';
import type { Redis } from 'ioredis';
import { afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test, vi } from 'vitest';
import type { AppendOutcome, OutboxEvent } from '../../src/event.ts';
import { withDeadline } from '../../src/lifecycle.ts';
import type { Standing } from '../../src/outbox/parked.ts';
import { CrashLimitError } from '../../src/publish/poison-guard.ts';
import { createPublish, type Released } from '../../src/publish/publish.ts';
import { createQueues, type FailedJob, publishQueueName, type Queues } from '../../src/queue/queues.ts';
import {
  createWorkers,
  type FailedRun,
  type Run,
  WORKER_CONNECTION,
  type Workers,
} from '../../src/queue/workers.ts';
import type { Appending } from '../../src/streams/append.ts';
import { createTally } from '../../src/telemetry/tally.ts';
import { untraced } from '../../src/telemetry/tracing.ts';
import { createRedis } from '../support/servers.ts';
import {
  type AdminRedis,
  aClaimedEvent,
  deferred,
  openAdminRedis,
  openRedis,
  silent,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const ENTRY_ID = '1700000000000-0';
const EPOCH = 'server/history:now';
const APPENDED: AppendOutcome = { status: 'appended', entryId: ENTRY_ID, epoch: EPOCH };
const EARLY: AppendOutcome = { status: 'early' };
const ASK_ROWS: AppendOutcome = { status: 'ask-rows' };

/** More than one attempt asks for. */
const APPENDS_MAX = 50;

type Deps = Parameters<typeof createPublish>[0];
type Failure = Parameters<Deps['outbox']['recordFailure']>[0];

/**
 * The publish stage beside stores that the test plays. What an attempt did is in `steps`; how it asked for its append, in
 * `appendings`; what it wanted to know of rows, in `questions`.
 *
 * @param outcomes of one append after the other; the last one again and again
 */
function setUp(outcomes: readonly AppendOutcome[] = [APPENDED], deps: Partial<Deps> = {}) {
  const steps: string[] = [];
  const appendings: Appending[] = [];
  const questions: (readonly [eventId: string, before: string | null])[] = [];
  /** Kinds, or whole standings where it matters which event is right before. */
  const standings: (Standing['kind'] | Standing)[] = [];
  const placed: (string | null | undefined)[] = [];
  const recorded: Failure[] = [];
  const dead: FailedJob[] = [];
  const epoch = { name: EPOCH as string | undefined };
  const publish = createPublish({
    streams: {
      async publish({ after }, appending) {
        placed.push(after);
        if (appendings.length >= APPENDS_MAX) throw new Error('it asks again and again');
        const outcome = outcomes[Math.min(appendings.length, outcomes.length - 1)] as AppendOutcome;
        appendings.push(appending);
        steps.push(outcome.status);
        return outcome;
      },
      isAppended: () => false,
      untilAppended: (_, ms) => delay(ms),
      mayHaveForgotten: () => false,
    },
    lookup: { find: async () => new Map() },
    epoch: { known: async () => epoch.name, current: () => epoch.name },
    outbox: {
      expireLeasesOf: async () => void steps.push('lease ends'),
      recordFailure: async (failure) => void recorded.push(failure),
    },
    rows: {
      async standingOf(...question) {
        questions.push(question);
        const next = standings.shift() ?? 'first';
        return typeof next === 'string' ? { kind: next, after: null } : next;
      },
    },
    queues: {
      inFlight: async () => ({ waiting: 0, active: 0, delayed: 0, prioritized: 0, failed: 0, total: 0 }),
    },
    removeJobs: async (events) => {
      steps.push(...events.map(() => 'job removed'));
      return new Map();
    },
    check: { problemOf: () => null, refusedEverything: async () => null },
    guard: {
      together: (_, append) => append(),
      alone: (_, __, append) => append(),
      clear: async () => void steps.push('cleared'),
      stop() {},
    },
    acknowledger: {
      acknowledge: async ({ entryId, epoch: of }) => void steps.push(`acknowledged ${entryId} of ${of}`),
    },
    deadLetters: { bury: async (job) => void dead.push(job) },
    parker: {
      park: (event, failedBefore) =>
        void steps.push(`park ${event.id}${failedBefore ? ', the one before failed' : ''}`),
      drain: async () => {},
    },
    metrics: {
      attempted: (_, { kind }) => void steps.push(`told: ${kind}`),
      published: (_, entryId) => void steps.push(`told of ${entryId}`),
    },
    tracing: untraced,
    onPublished: (topic) => void steps.push(`published to ${topic}`),
    options: { publishTimeoutMs: 20_000, maxInFlight: 400 },
    ...{ tally: createTally(silent), logger: silent },
    ...deps,
  });
  return { publish, steps, appendings, placed, questions, standings, recorded, dead, epoch };
}

/** An event whose job was made in this epoch, as far as nothing else is said. */
const anEvent = (overrides: Partial<OutboxEvent> = {}) => aClaimedEvent({ epoch: 'now', ...overrides });

/** A run of the event's job; the first one, as far as nothing else is said. */
const aRun = (event: OutboxEvent, overrides: Partial<Run<OutboxEvent>> = {}): Run<OutboxEvent> => ({
  ...{ id: event.eventId, name: event.eventType, data: event, madeAt: Date.now() },
  ...{ failures: 0, starts: 1, stalls: 0 },
  ...overrides,
});

const done = { kind: 'completed', result: null };

describe('an attempt', () => {
  test('checks, appends, acknowledges with what Redis answered, tells of it, and ends its job', async () => {
    const { publish, steps, appendings } = setUp(undefined, {
      check: {
        problemOf: () => {
          steps.push('checked');
          return null;
        },
        refusedEverything: async () => null,
      },
    });
    const run = aRun(anEvent());
    expect(await publish.process(run)).toEqual(done);
    expect(steps).toEqual([
      ...['checked', 'appended', `acknowledged ${ENTRY_ID} of ${EPOCH}`],
      ...[`told of ${ENTRY_ID}`, 'published to identity.user.v1', 'told: done'],
    ]);
    expect(appendings).toEqual([{ epoch: EPOCH, gate: 'open', madeAt: run.madeAt }]);
  });

  test('of an event whose job remembers its entry acknowledges that', async () => {
    const { publish, steps } = setUp([{ status: 'remembered', entryId: '7-7', epoch: EPOCH }]);
    expect(await publish.process(aRun(anEvent()))).toEqual(done);
    expect(steps).toContain(`acknowledged 7-7 of ${EPOCH}`);
  });

  test('whose row cannot be marked is made again, at no cost', async () => {
    const { publish, steps } = setUp(undefined, {
      acknowledger: { acknowledge: () => Promise.reject(new Error('no database')) },
    });
    expect(await publish.process(aRun(anEvent()))).toEqual({ kind: 'delayed', ms: 1_000 });
    expect(steps).toEqual(['appended', 'told: postpone']);
  });

  test('of an event that is over by its row ends its job, and acknowledges nothing', async () => {
    const { publish, steps } = setUp([{ status: 'over' }]);
    expect(await publish.process(aRun(anEvent()))).toEqual(done);
    expect(steps).toEqual(['over', 'told: done']);
  });

  test('whose job is gone acknowledges nothing, and ends the lease of the row: that decides', async () => {
    const { publish, steps } = setUp([{ status: 'gone' }]);
    expect(await publish.process(aRun(anEvent()))).toEqual(done);
    expect(steps).toEqual(['gone', 'lease ends', 'told: done']);
    const away = setUp([{ status: 'gone' }], {
      outbox: {
        expireLeasesOf: () => Promise.reject(new Error('no database')),
        recordFailure: async () => {},
      },
    });
    expect(await away.publish.process(aRun(anEvent()))).toEqual(done);
  });

  test.each([false, true])(
    'that is behind (one that failed: %s) ends its job first; the row is parked by the run that ended it',
    async (failedBefore) => {
      const { publish, steps } = setUp([{ status: 'behind', failedBefore }]);
      const run = aRun(anEvent({ id: '42' }));
      const fate = await publish.process(run);
      expect(fate).toEqual({ kind: 'completed', result: expect.objectContaining({ failedBefore }) });
      expect(steps).toEqual(['behind', 'told: release']);
      publish.onCompleted(run, (fate as { result: Released }).result);
      expect(steps.at(-1)).toBe(failedBefore ? 'park 42, the one before failed' : 'park 42');
    },
  );

  test('that published its event, or had none, parks nothing when its job has ended', () => {
    const { publish, steps } = setUp();
    publish.onCompleted(aRun(anEvent()), null);
    publish.onCompleted({ ...aRun(anEvent()), data: null }, { failedBefore: false, after: null });
    expect(steps).toEqual([]);
  });

  test('that was refused costs an attempt; one that found nobody there costs none', async () => {
    const refused = setUp([{ status: 'refused', reason: 'WRONGTYPE' }]);
    expect(await refused.publish.process(aRun(anEvent()))).toEqual({
      ...{ kind: 'failed', reason: 'WRONGTYPE', isFinal: false },
    });
    expect(refused.steps).toEqual(['refused', 'told: retry']);
    const unavailable = setUp([{ status: 'unavailable', reason: 'OOM' }]);
    expect(await unavailable.publish.process(aRun(anEvent()))).toEqual({ kind: 'delayed', ms: 1_000 });
    expect(unavailable.steps).toEqual(['unavailable', 'told: postpone']);
  });

  test('that was refused with everything else costs none', async () => {
    const asked: unknown[] = [];
    const { publish } = setUp([{ status: 'refused', reason: 'NOPERM' }], {
      check: {
        problemOf: () => null,
        refusedEverything: async ({ eventId }, reason) => {
          asked.push([eventId, reason]);
          return 'NOPERM everything';
        },
      },
    });
    const event = anEvent();
    expect(await publish.process(aRun(event))).toEqual({ kind: 'delayed', ms: 1_000 });
    expect(asked).toEqual([[event.eventId, 'NOPERM']]);
  });

  test('of an event with a problem is its last one, before anything is written', async () => {
    const { publish, steps } = setUp(undefined, {
      check: { problemOf: () => 'topic is empty', refusedEverything: async () => null },
    });
    expect(await publish.process(aRun(anEvent()))).toEqual({
      ...{ kind: 'failed', reason: 'topic is empty', isFinal: true },
    });
    expect(steps).toEqual(['told: give-up']);
  });

  test('that hangs is given up after its time, at no cost', async () => {
    const { publish } = setUp(undefined, {
      acknowledger: { acknowledge: () => new Promise(() => {}) },
      options: { publishTimeoutMs: 50, maxInFlight: 400 },
    });
    expect(await publish.process(aRun(anEvent()))).toEqual({ kind: 'delayed', ms: 1_000 });
  });

  test('that cannot ask the rows is made again, at no cost', async () => {
    const { publish, steps } = setUp([ASK_ROWS], {
      rows: { standingOf: () => Promise.reject(new Error('no database')) },
    });
    expect(await publish.process(aRun(anEvent()))).toEqual({ kind: 'delayed', ms: 1_000 });
    expect(steps).toEqual(['ask-rows', 'told: postpone']);
  });

  test.each([null, {}])('whose job holds %j ends it, and nothing else happens', async (data) => {
    const { publish, steps, recorded, dead } = setUp();
    const run = { ...aRun(anEvent()), data: data as OutboxEvent | null };
    expect(await publish.process(run)).toEqual(done);
    publish.onFailed({ ...run, error: new Error('x'), failedForGoodAt: new Date(), retryInMs: 0 });
    await publish.drain();
    expect([steps, recorded, dead]).toEqual([[], [], []]);
  });

  test('is numbered from the first attempt of its event, and told to the trace before and after', async () => {
    const numbers: number[] = [];
    const trace = { traceparent: 'own' };
    const acknowledged: unknown[] = [];
    const appended: unknown[] = [];
    const { publish } = setUp(undefined, {
      tracing: {
        publish(event, attempt, work) {
          numbers.push(attempt);
          return work({ ...event, trace });
        },
        append: (event, work) => {
          appended.push(event.trace);
          return work(event);
        },
      },
      acknowledger: { acknowledge: async ({ event }) => void acknowledged.push(event.trace) },
    });
    await publish.process(aRun(anEvent({ attempts: 2 }), { failures: 1 }));
    expect([numbers, appended, acknowledged]).toEqual([[4], [trace], [trace]]);
  });

  test('of an outage is one line in the log, however many events are postponed', async () => {
    const warned: unknown[] = [];
    const { publish } = setUp([{ status: 'unavailable', reason: 'OOM' }], {
      logger: { ...silent, warn: (fields) => void warned.push(fields) },
    });
    for (let i = 0; i < 5; i++) await publish.process(aRun(anEvent()));
    expect(warned).toEqual([{ events: 1, reason: 'OOM' }]);
    // An outage of some seconds more, in which the clock is set back by an hour.
    const [now, ms] = [Date.now(), performance.now()];
    const spies = [
      vi.spyOn(Date, 'now').mockImplementation(() => now - 3_600_000),
      vi.spyOn(performance, 'now').mockImplementation(() => ms + 10_000),
    ];
    onTestFinished(() => {
      for (const spy of spies) spy.mockRestore();
    });
    await publish.process(aRun(anEvent()));
    expect(warned.slice(1)).toEqual([{ events: 5, reason: 'OOM' }]);
  });
});

describe('the guard', () => {
  /** A guard that tells when its part begins and ends, and how. */
  const guarded = (steps: () => string[], deps: Partial<Deps> = {}): Partial<Deps> => {
    const inside = async <T>(how: string, append: () => Promise<T>): Promise<T> => {
      steps().push(`${how} begins`);
      const result = await append();
      steps().push(`${how} ends`);
      return result;
    };
    return {
      guard: {
        together: (_, append) => inside('together', append),
        alone: (eventId, _, append) => inside(`${eventId} alone`, append),
        clear: async () => {},
        stop() {},
      },
      ...deps,
    };
  };

  test('has the part in which an event can harm its pod: from its check to the answer to its append', async () => {
    const { publish, steps } = setUp(
      undefined,
      guarded(() => steps, {
        check: {
          problemOf: () => {
            steps.push('checked');
            return null;
          },
          refusedEverything: async () => null,
        },
      }),
    );
    await publish.process(aRun(anEvent()));
    expect(steps.slice(0, 5)).toEqual([
      ...['together begins', 'checked', 'appended', 'together ends'],
      `acknowledged ${ENTRY_ID} of ${EPOCH}`,
    ]);
  });

  test('lets an event alone whose job has stalled, and that holds no place while it is early', async () => {
    const { publish, steps } = setUp(
      [EARLY],
      guarded(() => steps),
    );
    const event = anEvent({ after: anEvent().eventId });
    expect(await publish.process(aRun(event, { stalls: 1 }))).toEqual({ kind: 'delayed', ms: 50 });
    expect(steps).toEqual([
      ...[`${event.eventId} alone begins`, 'early', `${event.eventId} alone ends`, 'told: wait'],
    ]);
  });

  test('does not wait for an epoch: the attempt has waited for it before', async () => {
    const { publish, steps, epoch } = setUp(
      undefined,
      guarded(() => steps, {
        epoch: {
          current: () => epoch.name,
          async known() {
            steps.push('waited for the epoch');
            epoch.name = undefined;
            return undefined;
          },
        },
      }),
    );
    epoch.name = undefined;
    expect(await publish.process(aRun(anEvent()))).toEqual({ kind: 'delayed', ms: 1_000 });
    expect(steps).toEqual(['waited for the epoch', 'together begins', 'together ends', 'told: postpone']);
  });

  test('gives up an event that has ended too many pods', async () => {
    const { publish, steps } = setUp(undefined, {
      guard: {
        together: (_, append) => append(),
        alone: () => Promise.reject(new CrashLimitError(3)),
        clear: async () => {},
        stop() {},
      },
    });
    expect(await publish.process(aRun(anEvent(), { stalls: 1 }))).toEqual({
      ...{ kind: 'failed', isFinal: true, reason: expect.stringContaining('ended 3 times') },
    });
    expect(steps).toEqual(['told: give-up']);
  });
});

describe('the gate', () => {
  const before = '00000000-0000-4000-8000-000000000001';
  const gatesOf = async (
    event: OutboxEvent,
    run: Partial<Run<OutboxEvent>> = {},
    isAppended = false,
  ): Promise<string[]> => {
    const { publish, appendings } = setUp(undefined, {
      streams: {
        publish: async (_, appending) => {
          appendings.push(appending);
          return APPENDED;
        },
        isAppended: (eventId, epoch) => isAppended && eventId === before && epoch === EPOCH,
        untilAppended: async () => {},
        mayHaveForgotten: () => false,
      },
    });
    await publish.process(aRun(event, run));
    return appendings.map((it) => it.gate);
  };

  test('is open for an event with none before it, or one that this pod knows to be in its stream', async () => {
    expect(await gatesOf(anEvent({ after: null }))).toEqual(['open']);
    expect(await gatesOf(anEvent())).toEqual(['open']);
    expect(await gatesOf(anEvent({ after: before }), {}, true)).toEqual(['open']);
    expect(await gatesOf(anEvent({ after: before }))).toEqual(['after']);
    // Postponed, its job has not failed: what was before it then is before it now.
    expect(await gatesOf(anEvent({ after: before }), { starts: 3 })).toEqual(['after']);
  });

  test.each<[string, Partial<OutboxEvent>, Partial<Run<OutboxEvent>>]>([
    ['an attempt failed before', {}, { failures: 1 }],
    ['a pod stopped with its job', {}, { stalls: 1 }],
    ['its job was made in another epoch', { epoch: 'before' }, {}],
  ])('asks the rows when %s, whatever was before it then', async (_, overrides, run) => {
    for (const after of [null, before]) {
      const { publish, appendings, questions } = setUp([ASK_ROWS, APPENDED]);
      const event = anEvent({ after, ...overrides });
      expect(await publish.process(aRun(event, run))).toEqual(done);
      expect(appendings.map((it) => it.gate)).toEqual(['ask', 'open']);
      expect(questions).toEqual([[event.eventId, null]]);
    }
  });

  test('asks the rows when its job was made by a build that knew no epochs', async () => {
    const { publish, appendings } = setUp([ASK_ROWS, APPENDED]);
    expect(await publish.process(aRun(aClaimedEvent()))).toEqual(done);
    expect(appendings.map((it) => it.gate)).toEqual(['ask', 'open']);
  });

  test.each<[Standing['kind'], string[], object, AppendOutcome[]]>([
    ['first', ['after', 'open'], done, [ASK_ROWS, APPENDED]],
    ['over', ['after'], done, [ASK_ROWS]],
    ['early', ['after'], { kind: 'delayed', ms: 50 }, [ASK_ROWS]],
    ['unclaimed', ['after'], { kind: 'delayed', ms: 50 }, [ASK_ROWS]],
    [
      ...(['behind', ['after', 'release']] as [Standing['kind'], string[]]),
      { kind: 'completed', result: expect.objectContaining({ failedBefore: false }) },
      [ASK_ROWS, { status: 'behind', failedBefore: false }],
    ],
  ])('that asks the rows, which say "%s", is asked as %j', async (standing, gates, fate, outcomes) => {
    const { publish, appendings, questions, standings } = setUp(outcomes);
    standings.push(standing);
    const event = anEvent({ after: before });
    expect(await publish.process(aRun(event))).toEqual(fate);
    expect(appendings.map((it) => it.gate)).toEqual(gates);
    // On its first run in its epoch the event before it is the one before it.
    expect(questions).toEqual([[event.eventId, before]]);
  });

  test.each([
    ['a later run', { failures: 1 }, {}],
    ['a run after a crash', { stalls: 1 }, {}],
    ['a job of an earlier epoch', {}, { epoch: 'server/history:earlier' }],
  ])('that is early according to the rows waits for the event that they name: %s', async (_, run, of) => {
    const early: AppendOutcome = { status: 'early' };
    const { publish, appendings, placed, standings } = setUp([ASK_ROWS, early, APPENDED]);
    const now = aClaimedEvent().eventId;
    standings.push({ kind: 'early', after: now });
    const fate = await publish.process(aRun(anEvent({ after: before, ...of }), run));
    // A run after a crash holds no place: it comes again soon.
    const isStalled = 'stalls' in run;
    expect(fate).toEqual(isStalled ? { kind: 'delayed', ms: 50 } : done);
    expect(appendings.map((it) => it.gate)).toEqual(['ask', 'after', ...(isStalled ? [] : ['after'])]);
    expect(placed).toEqual([null, now, ...(isStalled ? [] : [now])]);
  });

  test('that is behind the event that the rows named parks its row behind that one', async () => {
    const failed: AppendOutcome = { status: 'behind', failedBefore: true };
    const now = aClaimedEvent().eventId;
    const parked: unknown[] = [];
    const { publish, standings } = setUp([ASK_ROWS, failed], {
      parker: {
        park: ({ after }, failedBefore) => void parked.push([after, failedBefore]),
        drain: async () => {},
      },
    });
    standings.push({ kind: 'early', after: now });
    const run = aRun(anEvent({ after: before }), { failures: 1 });
    const fate = await publish.process(run);
    publish.onCompleted(run, fate.kind === 'completed' ? fate.result : null);
    expect(parked).toEqual([[now, true]]);
  });

  test('asks the rows no further when the job of the event that they named is gone, too', async () => {
    const { publish, appendings, questions, standings } = setUp([ASK_ROWS]);
    const now = aClaimedEvent().eventId;
    standings.push({ kind: 'early', after: now }, { kind: 'early', after: now });
    const fate = await publish.process(aRun(anEvent({ after: before })));
    expect(fate).toEqual({ kind: 'delayed', ms: 50 });
    expect(appendings.map((it) => it.gate)).toEqual(['after', 'after']);
    expect(questions).toHaveLength(2);
  });

  test('ends the lease of the event before when that has had no job for a while', async () => {
    const ended: string[] = [];
    const { publish, standings } = setUp([ASK_ROWS], {
      outbox: {
        expireLeasesOf: async (eventIds) => void ended.push(...eventIds),
        recordFailure: async () => {},
      },
    });
    const attempt = async (starts: number) => {
      standings.push({ kind: 'early', after: before });
      return publish.process(aRun(anEvent({ after: before }), { starts }));
    };
    expect(await attempt(5)).toEqual({ kind: 'delayed', ms: 800 });
    expect(ended).toEqual([]);
    expect(await attempt(6)).toEqual({ kind: 'delayed', ms: 1_000 });
    expect(ended).toEqual([before]);
  });

  test('that was released answers the entry all the same, where there is one', async () => {
    const { publish, standings, steps } = setUp([
      ASK_ROWS,
      { status: 'remembered', entryId: '7-7', epoch: EPOCH },
    ]);
    standings.push('behind');
    expect(await publish.process(aRun(anEvent({ after: before })))).toEqual(done);
    expect(steps).toContain(`acknowledged 7-7 of ${EPOCH}`);
  });

  test('asks the rows once more when the epoch ended meanwhile', async () => {
    const { publish, appendings, questions, epoch } = setUp([ASK_ROWS, ASK_ROWS, APPENDED], {
      rows: {
        standingOf: async (...question) => {
          questions.push(question);
          epoch.name = 'server/history:next';
          return { kind: 'first', after: null };
        },
      },
    });
    const event = anEvent({ after: before });
    await publish.process(aRun(event));
    expect(appendings.map(({ gate, epoch: of }) => [gate, of])).toEqual([
      ['after', EPOCH],
      ['ask', 'server/history:next'],
      ['open', 'server/history:next'],
    ]);
    expect(questions).toEqual([
      [event.eventId, before],
      [event.eventId, null],
    ]);
  });

  test('is not tried when the epoch ended meanwhile and none is known', async () => {
    const { publish, appendings, epoch } = setUp([ASK_ROWS], {
      rows: {
        standingOf: async () => {
          epoch.name = undefined;
          return { kind: 'first', after: null };
        },
      },
    });
    expect(await publish.process(aRun(anEvent({ after: before })))).toEqual({ kind: 'delayed', ms: 1_000 });
    expect(appendings).toHaveLength(1);
  });
});

describe('an early event', () => {
  const early = () => anEvent({ after: anEvent().eventId });

  test('holds its place for a moment: it is appended as soon as the one before it is', async () => {
    const waits: (readonly [readonly string[], number])[] = [];
    const outcomes = [EARLY, EARLY, APPENDED];
    const { publish, appendings } = setUp(outcomes, {
      streams: {
        publish: async (_, appending) => outcomes[appendings.push(appending) - 1] as AppendOutcome,
        isAppended: () => false,
        untilAppended: async (...wait) => void waits.push(wait),
        mayHaveForgotten: () => false,
      },
    });
    const event = early();
    expect(await publish.process(aRun(event))).toEqual(done);
    expect(appendings.map((it) => it.gate)).toEqual(['after', 'after', 'after']);
    // Its own append as well: the cascade of another pod's script, or of this one's.
    expect(waits).toEqual(Array(2).fill([[event.eventId, event.after], 10]));
  });

  test('holds its place for no longer than a moment', async () => {
    const { publish, steps } = setUp([EARLY], {});
    const beganAt = performance.now();
    expect(await publish.process(aRun(early()))).toEqual({ kind: 'delayed', ms: 50 });
    expect(performance.now() - beganAt).toBeGreaterThan(55);
    expect(new Set(steps)).toEqual(new Set(['early', 'told: wait']));
  });

  test('opens its gate when this pod appended the one before it meanwhile', async () => {
    let isAppended = false;
    const gates: string[] = [];
    const { publish } = setUp([], {
      streams: {
        publish: async (_, { gate }) => {
          gates.push(gate);
          return gate === 'open' ? APPENDED : EARLY;
        },
        isAppended: () => isAppended,
        untilAppended: async () => {
          isAppended = true;
        },
        mayHaveForgotten: () => false,
      },
    });
    expect(await publish.process(aRun(early()))).toEqual(done);
    expect(gates).toEqual(['after', 'open']);
  });

  test('is put off very briefly, then for twice as long each time, up to a second', async () => {
    const { publish, standings } = setUp([EARLY]);
    const delays: unknown[] = [];
    for (let starts = 1; starts <= 8; starts++) {
      standings.push('early');
      // Without a place to hold: that of a stalled one.
      const fate = await publish.process(aRun(early(), { starts, stalls: 1 }));
      delays.push(fate.kind === 'delayed' ? fate.ms : fate);
    }
    expect(delays).toEqual([50, 100, 200, 400, 800, 1_000, 1_000, 1_000]);
  });

  test('asks the rows as well once it was put off for two seconds or so', async () => {
    const event = early();
    for (const [starts, asked] of [
      [5, 0],
      [6, 1],
      [60, 1],
    ] as const) {
      const { publish, questions, standings } = setUp([EARLY]);
      standings.push('early');
      const fate = await publish.process(aRun(event, { starts }));
      expect(fate).toEqual({ kind: 'delayed', ms: Math.min(1_000, 50 * 2 ** (starts - 1)) });
      expect(questions).toEqual(Array(asked).fill([event.eventId, event.after]));
    }
    const { publish, standings, appendings } = setUp([EARLY, { status: 'behind', failedBefore: false }]);
    standings.push('behind');
    const fate = await publish.process(aRun(event, { starts: 6 }));
    expect(fate).toEqual({ kind: 'completed', result: expect.objectContaining({ failedBefore: false }) });
    expect(appendings.map((it) => it.gate)).toEqual(['after', 'release']);
  });
});

describe('a job whose rows say that an earlier event is not claimed yet', () => {
  const RELEASED: AppendOutcome = { status: 'behind', failedBefore: false };
  const before = aClaimedEvent().eventId;
  const asked = async (event: OutboxEvent, run: Partial<Run<OutboxEvent>>) => {
    const { publish, standings } = setUp([ASK_ROWS, RELEASED]);
    standings.push('unclaimed');
    return publish.process(aRun(event, run));
  };
  const released = { kind: 'completed', result: expect.objectContaining({ failedBefore: false }) };

  test('waits, for the claim may not have committed, and is released after two seconds or so', async () => {
    const event = anEvent({ after: before });
    expect(await asked(event, { starts: 5 })).toEqual({ kind: 'delayed', ms: 800 });
    expect(await asked(event, { starts: 6 })).toEqual(released);
  });

  test('is released at once where it was made in another epoch, failed or stalled', async () => {
    expect(await asked(anEvent({ after: before, epoch: 'other' }), {})).toEqual(released);
    expect(await asked(anEvent({ after: before }), { failures: 1 })).toEqual(released);
    expect(await asked(anEvent({ after: before }), { stalls: 1 })).toEqual(released);
  });
});

describe('a job that is older than what is remembered of it', () => {
  const forgetful = (found: ReadonlyMap<string, string>) => {
    const asked: unknown[] = [];
    const stage = setUp(undefined, {
      streams: {
        publish: async (_, appending) => {
          stage.appendings.push(appending);
          return APPENDED;
        },
        isAppended: () => false,
        untilAppended: async () => {},
        mayHaveForgotten: (madeAt) => madeAt === 5,
      },
      lookup: {
        find: async (...question) => {
          asked.push(question);
          return new Map(found);
        },
      },
    });
    return { ...stage, asked };
  };

  test('looks for the entry in the stream first, and acknowledges that', async () => {
    const event = anEvent();
    const { publish, asked, appendings, steps } = forgetful(new Map([[event.eventId, '5-5']]));
    expect(await publish.process(aRun(event, { madeAt: 5 }))).toEqual(done);
    expect(asked).toEqual([[event.topic, [event.eventId]]]);
    expect(appendings).toEqual([]);
    expect(steps).toContain(`acknowledged 5-5 of ${EPOCH}`);
  });

  test('appends the event when there is none; a younger job does not look', async () => {
    const { publish, asked, appendings } = forgetful(new Map());
    expect(await publish.process(aRun(anEvent(), { madeAt: 5 }))).toEqual(done);
    expect([asked.length, appendings.length]).toEqual([1, 1]);
    expect(await publish.process(aRun(anEvent(), { madeAt: 6 }))).toEqual(done);
    expect([asked.length, appendings.length]).toEqual([1, 2]);
  });
});

describe('a failed attempt', () => {
  const failedRun = (event: OutboxEvent, overrides: Partial<FailedRun<OutboxEvent>> = {}) => ({
    ...aRun(event, { failures: 1 }),
    ...{ error: new Error('WRONGTYPE'), failedForGoodAt: null, retryInMs: 60_000 },
    ...overrides,
  });

  test('is mirrored on its row: how many there were, why, and when the next one comes', async () => {
    const { publish, recorded, dead, steps } = setUp();
    const event = anEvent({ id: '42', attempts: 1 });
    publish.onFailed(failedRun(event));
    await publish.drain();
    const { eventId } = event;
    expect(recorded).toEqual([{ id: '42', eventId, attempts: 2, reason: 'WRONGTYPE', retryInMs: 60_000 }]);
    expect([dead, steps]).toEqual([[], []]);
  });

  test('after which there is no other is the end of its event', async () => {
    const { publish, recorded, dead, steps } = setUp();
    const event = anEvent({ attempts: 2 });
    const run = failedRun(event, { failures: 4, failedForGoodAt: new Date(5), madeAt: 3 });
    publish.onFailed(run);
    await publish.drain();
    expect(dead).toEqual([{ event, attempts: 6, reason: 'WRONGTYPE', failedAt: new Date(5), madeAt: 3 }]);
    expect([recorded, steps]).toEqual([[], []]);
  });

  test('of an event that was alone takes its count back when the event is dead: who retries it means it', async () => {
    const { publish, steps } = setUp();
    publish.onFailed(failedRun(anEvent(), { stalls: 1, failedForGoodAt: new Date() }));
    publish.onFailed(failedRun(anEvent(), { stalls: 1 }));
    await publish.drain();
    expect(steps).toEqual(['cleared']);
  });

  test.each([
    [100, []],
    [101, ['job removed']],
  ])(
    'with %i retries in Redis, of 400 jobs at most, leaves the job there or not: %j',
    async (delayed, gone) => {
      const { publish, steps, recorded } = setUp(undefined, {
        queues: {
          inFlight: async () => ({
            waiting: 0,
            active: 0,
            delayed,
            prioritized: 0,
            failed: 0,
            total: delayed,
          }),
        },
      });
      publish.onFailed(failedRun(anEvent()));
      publish.onFailed(failedRun(anEvent(), { failedForGoodAt: new Date() }));
      await publish.drain();
      expect([steps, recorded.length]).toEqual([gone, 1]);
    },
  );

  test('that cannot be recorded keeps its job, and harms nobody', async () => {
    const logged: unknown[] = [];
    const { publish, steps } = setUp(undefined, {
      outbox: {
        expireLeasesOf: async () => {},
        recordFailure: () => Promise.reject(new Error('no database')),
      },
      deadLetters: { bury: () => Promise.reject(new Error('no database')) },
      queues: {
        inFlight: async () => ({
          waiting: 0,
          active: 0,
          delayed: 400,
          prioritized: 0,
          failed: 0,
          total: 400,
        }),
      },
      tally: { ...createTally(silent), error: (_, __, text) => void logged.push(text) },
    });
    publish.onFailed(failedRun(anEvent()));
    publish.onFailed(failedRun(anEvent(), { failedForGoodAt: new Date(), stalls: 1 }));
    await publish.drain();
    expect([steps, logged.length]).toEqual([[], 2]);
  });

  test('is waited for when the stage drains', async () => {
    const written = deferred();
    const order: string[] = [];
    const { publish } = setUp(undefined, {
      deadLetters: {
        bury: async () => {
          await written.promise;
          order.push('written');
        },
      },
    });
    publish.onFailed(failedRun(anEvent(), { failedForGoodAt: new Date() }));
    const draining = publish.drain().then(() => order.push('drained'));
    await new Promise(setImmediate);
    written.resolve();
    await draining;
    expect(order).toEqual(['written', 'drained']);
  });
});

describe('on BullMQ', () => {
  const BASE_MS = 20;
  const QUEUE = { queuePrefix: 'bull', queueName: 'relay', retryBaseDelayMs: BASE_MS, maxRetryAttempts: 3 };

  let url: string;
  let admin: AdminRedis;
  let redis: Redis;
  let queues: Queues;
  const running: Workers[] = [];

  beforeAll(async () => {
    const server = await createRedis();
    url = server.url;
    admin = openAdminRedis(server.adminUrl);
    redis = openRedis(url);
    queues = createQueues(redis, QUEUE, silent);
  });

  beforeEach(async () => {
    await admin.flushall();
  });

  afterEach(async () => {
    await Promise.all(running.splice(0).map((it) => it.stop(1_000)));
  });

  /** Workers whose appends come out as told. */
  function start(
    append: (event: OutboxEvent, appending: Appending) => Promise<AppendOutcome>,
    deps: Partial<Deps> = {},
    { concurrency = 10 } = {},
  ) {
    const stage = setUp(undefined, {
      streams: {
        publish: append,
        isAppended: () => false,
        untilAppended: async () => {},
        mayHaveForgotten: () => false,
      },
      queues,
      removeJobs: async (events) => {
        for (const { eventId } of events) await queues.remove(eventId);
        return new Map();
      },
      options: { publishTimeoutMs: 5_000, maxInFlight: 400 },
      ...deps,
    });
    const workers = createWorkers<OutboxEvent, Released | null>({
      ...{ queuePrefix: 'bull', queueName: publishQueueName('relay'), concurrency, logger: silent },
      ...{
        timeoutMs: deps.options?.publishTimeoutMs ?? 5_000,
        connection: openRedis(url, WORKER_CONNECTION),
      },
      ...stage.publish,
    });
    running.push(workers);
    workers.start();
    return { ...stage, workers };
  }

  const refused = async (): Promise<AppendOutcome> => ({ status: 'refused', reason: 'WRONGTYPE' });
  const stateOf = (event: OutboxEvent) => queues.publish.getJobState(event.eventId);
  const isGone = (event: OutboxEvent, timeoutMs = 15_000) =>
    waitFor(async () => (await stateOf(event)) === 'unknown', { what: 'the job to be done', timeoutMs });
  const outcomes = (...list: AppendOutcome[]) => {
    const rest = [...list];
    return async (): Promise<AppendOutcome> => rest.shift() ?? APPENDED;
  };
  const withLongDelays = () => createQueues(redis, { ...QUEUE, retryBaseDelayMs: 60_000 }, silent);

  test('an event comes to its append as it was claimed, byte for byte', async () => {
    const got: OutboxEvent[] = [];
    const { recorded, dead } = start(async (event) => {
      got.push(event);
      return APPENDED;
    });
    const event = anEvent({
      payload: '{"n": 12345678901234567890.10, "t": "Jörg \\u0000"}',
      ...{ tenantId: 't', after: null },
    });
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect(got).toEqual([event]);
    expect([recorded, dead]).toEqual([[], []]);
  });

  test('a refusal is retried, each time after twice the delay, then the event is given up', async () => {
    const { recorded, dead } = start(refused);
    const event = anEvent({ id: '42' });
    await queues.addPublishJobs([event]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    const { eventId } = event;
    expect(recorded).toEqual(
      [1, 2, 3].map((attempts) => ({
        ...{ id: '42', eventId, attempts, reason: 'WRONGTYPE', retryInMs: BASE_MS * 2 ** (attempts - 1) },
      })),
    );
    expect(dead).toMatchObject([{ event, attempts: 4, reason: 'WRONGTYPE', failedAt: expect.any(Date) }]);
    expect(await stateOf(event)).toBe('failed');
  });

  test('a job that was made again counts from the attempts before', async () => {
    const { recorded, dead } = start(refused);
    await queues.addPublishJobs([anEvent({ attempts: 2 })]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    expect(recorded).toMatchObject([{ attempts: 3, retryInMs: BASE_MS * 4 }]);
    expect(dead).toMatchObject([{ attempts: 4 }]);
  });

  test('an event that can never succeed is given up at once', async () => {
    const { recorded, dead } = start(refused, {
      check: { problemOf: () => 'topic is empty', refusedEverything: async () => null },
    });
    const event = anEvent();
    await queues.addPublishJobs([event]);
    await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
    expect(dead).toMatchObject([{ attempts: 1, reason: 'topic is empty' }]);
    expect(recorded).toEqual([]);
    expect(await stateOf(event)).toBe('failed');
  });

  test('what nobody could do is postponed at no cost, and done soon', async () => {
    const { recorded, dead } = start(outcomes({ status: 'unavailable', reason: 'OOM' }));
    const event = anEvent({ attempts: 3 }); // its only attempt is left
    await queues.addPublishJobs([event]);
    await waitFor(async () => (await stateOf(event)) === 'delayed', { what: 'the job to be postponed' });
    const job = await queues.publish.getJob(event.eventId);
    expect(job).toMatchObject({ attemptsMade: 0 });
    expect(job?.delay).toBeLessThanOrEqual(1_000);
    await isGone(event);
    expect([recorded, dead]).toEqual([[], []]);
  });

  test('an early event is tried very soon, and then less and less often, at no cost', async () => {
    const event = anEvent({ after: anEvent().eventId, attempts: 3 });
    const begunAt: number[] = [];
    const { recorded, dead } = start(async () => (begunAt.length < 5 ? EARLY : APPENDED), {
      check: {
        problemOf: () => {
          begunAt.push(performance.now());
          return null;
        },
        refusedEverything: async () => null,
      },
    });
    await queues.addPublishJobs([event]);
    await isGone(event);
    const waits = begunAt.slice(1).map((at, i) => at - (begunAt[i] as number));
    expect(waits).toHaveLength(4);
    for (const [i, wait] of waits.entries()) expect(wait).toBeGreaterThanOrEqual(50 * 2 ** i - 5);
    expect([recorded, dead]).toEqual([[], []]);
  });

  test('a released event is parked when its job is gone from Redis, not before', async () => {
    const states: Promise<string>[] = [];
    start(async () => ({ status: 'behind', failedBefore: true }), {
      parker: { park: (event) => void states.push(stateOf(event)), drain: async () => {} },
    });
    const event = anEvent();
    await queues.addPublishJobs([event]);
    await waitFor(() => states.length > 0, { what: 'the row to be parked' });
    expect(await Promise.all(states)).toEqual(['unknown']);
    expect(await admin.exists(queues.jobKey(event.eventId))).toBe(0);
  });

  test('an attempt that hangs is ended by its deadline, and made again', async () => {
    let attempts = 0;
    const { recorded, dead } = start(
      () => (++attempts === 1 ? new Promise(() => {}) : Promise.resolve(APPENDED)),
      { options: { publishTimeoutMs: 100, maxInFlight: 400 } },
    );
    const event = anEvent({ attempts: 3 });
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect([attempts, recorded, dead]).toEqual([2, [], []]);
  });

  test('an attempt that throws is nobody’s fault: it is made again', async () => {
    let attempts = 0;
    const { dead } = start(async () => {
      if (++attempts === 1) throw new Error('unforeseen');
      return APPENDED;
    });
    const event = anEvent({ attempts: 3 });
    await queues.addPublishJobs([event]);
    await isGone(event);
    expect([attempts, dead]).toEqual([2, []]);
  });

  test('attempts that take the longer the more are made at once are made fewer at a time, and none for ever', async () => {
    // One server for all, which does not know what was given up meanwhile: 200 at once take a second.
    const SERVED_IN_MS = 5;
    let served = Promise.resolve();
    let attempts = 0;
    const { workers } = start(
      () => {
        attempts++;
        served = served.then(() => delay(SERVED_IN_MS));
        return served.then(() => APPENDED);
      },
      { options: { publishTimeoutMs: 200, maxInFlight: 400 } },
      { concurrency: 200 },
    );
    const events = Array.from({ length: 300 }, () => anEvent());
    await queues.addPublishJobs(events);
    const left = async () => (await queues.inFlight()).total;
    await waitFor(async () => (await left()) === 0, { what: 'all to be done', timeoutMs: 50_000 });
    expect(attempts).toBeGreaterThan(events.length);
    expect(workers.slots()).toBeLessThan(200);
  });

  test('a job that lost its hash, and one that is not ours, are done and removed; the others are published', async () => {
    const got: string[] = [];
    const { recorded, dead } = start(async ({ eventId }) => {
      got.push(eventId);
      return APPENDED;
    });
    const [event, lost] = [anEvent(), anEvent()];
    const foreign = queues.jobKey('foreign');
    await admin.hset(foreign, { name: 'x', data: 'null', opts: '{}', timestamp: 1 });
    await admin.rpush(queues.publish.toKey('wait'), 'foreign', lost.eventId);
    await queues.addPublishJobs([event]);
    await waitFor(async () => (await queues.inFlight()).total === 0, { what: 'all jobs to be done' });
    expect(await admin.exists(foreign, queues.jobKey(lost.eventId))).toBe(0);
    expect(got).toEqual([event.eventId]);
    // Nothing is in the way of the lost one's next job.
    await queues.addPublishJobs([lost]);
    await waitFor(() => got.includes(lost.eventId), { what: 'the event to be published' });
    expect([recorded, dead]).toEqual([[], []]);
  });

  describe('when too many retries wait in Redis', () => {
    const NONE = { options: { publishTimeoutMs: 5_000, maxInFlight: 3 } };

    test('further ones wait on their rows: the job is gone, the row knows when', async () => {
      const { recorded, dead } = start(refused, NONE);
      const event = anEvent({ id: '7', attempts: 1 });
      await withLongDelays().addPublishJobs([event]);
      await isGone(event);
      expect(recorded).toMatchObject([{ id: '7', attempts: 2, reason: 'WRONGTYPE', retryInMs: 120_000 }]);
      expect(dead).toEqual([]);
    });

    test('the last attempt is given up all the same', async () => {
      const { dead } = start(refused, NONE);
      const event = anEvent({ attempts: 3 });
      await queues.addPublishJobs([event]);
      await waitFor(() => dead.length > 0, { what: 'the event to be given up' });
      expect(await stateOf(event)).toBe('failed');
    });

    test('no more of them than a quarter of all jobs stay in Redis', async () => {
      const { recorded } = start(refused, { options: { publishTimeoutMs: 5_000, maxInFlight: 20 } });
      await withLongDelays().addPublishJobs(Array.from({ length: 12 }, () => anEvent()));
      await waitFor(() => recorded.length === 12, { what: 'all to have failed once' });
      // Many fail at the same moment: each must see that there are too many, none may count on the others.
      await waitFor(async () => (await queues.inFlight()).total <= 5, { what: 'the others to be gone' });
      expect(new Set(recorded.map((it) => it.retryInMs))).toEqual(new Set([60_000]));
    });

    test('a retry whose row cannot be noted stays in Redis', async () => {
      const { publish } = start(refused, {
        ...NONE,
        outbox: {
          expireLeasesOf: async () => {},
          recordFailure: () => Promise.reject(new Error('no database')),
        },
      });
      const event = anEvent();
      await withLongDelays().addPublishJobs([event]);
      await waitFor(async () => (await stateOf(event)) === 'delayed', { what: 'the job to wait' });
      await publish.drain();
      expect(await stateOf(event)).toBe('delayed');
    });
  });

  test('of many that fail at once a few are written at a time, and no more fail than can be written', async () => {
    const [MANY, SLOTS, AT_ONCE, WRITING_MS] = [80, 10, 4, 20];
    let [failed, begun, now, most, mostAhead] = [0, 0, 0, 0, 0];
    const write = async () => {
      begun++;
      most = Math.max(most, ++now);
      await delay(WRITING_MS);
      now--;
    };
    const isHopeless = ({ id }: OutboxEvent) => Number(id) % 2 === 0;
    const fail = () => {
      mostAhead = Math.max(mostAhead, ++failed - begun);
    };
    start(
      async () => {
        fail();
        return { status: 'refused', reason: 'x' };
      },
      {
        check: {
          problemOf(event) {
            if (!isHopeless(event)) return null;
            fail();
            return 'x';
          },
          refusedEverything: async () => null,
        },
        outbox: { expireLeasesOf: async () => {}, recordFailure: write },
        deadLetters: { bury: write },
      },
      { concurrency: SLOTS },
    );
    await withLongDelays().addPublishJobs(
      Array.from({ length: MANY }, (_, id) => anEvent({ id: String(id) })),
    );
    await waitFor(() => begun === MANY, { what: 'all to be written' });
    expect(most).toBe(AT_ONCE);
    // Each slot has one that has failed, and one whose slot was taken may wait to be written.
    expect(mostAhead).toBeLessThanOrEqual(2 * SLOTS);
  });

  test('workers live on when nothing can be noted on rows and no dead letter be written', async () => {
    start(async () => APPENDED, {
      check: {
        problemOf: ({ payload }) => (payload === '"bad"' ? 'bad' : null),
        refusedEverything: async () => null,
      },
      outbox: {
        expireLeasesOf: async () => {},
        recordFailure: () => Promise.reject(new Error('no database')),
      },
      deadLetters: { bury: () => Promise.reject(new Error('no database')) },
    });
    const bad = anEvent({ payload: '"bad"' });
    const good = anEvent();
    await queues.addPublishJobs([bad]);
    await waitFor(async () => (await stateOf(bad)) === 'failed', { what: 'the bad one to fail' });
    await queues.addPublishJobs([good]);
    await withDeadline(20_000, isGone(good));
  });
});
