/**
 * Real code taken step by step. Each call to a server waits until the walk lets it go on, so a walk decides what comes
 * between what, and the same walk comes to the same end.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type pg from 'pg';
import type { Pool } from '../../src/connections/database.ts';
import type { AdminPool } from '../support/stages.ts';

/** Whoever does work: a pod, a producer, an operator. */
export type Actor = {
  readonly name: string;
  isDead: boolean;
  readonly clients: Set<Client>;
};

type Client = {
  readonly client: pg.PoolClient;
  readonly pid: number;
  isBusy: boolean;
  isReleased: boolean;
};

/** A call on its way to a server; to PostgreSQL with the process that works on it. */
type Flight = Readonly<{ what: string; pid: number | undefined }>;

/** A call that waits. */
export type Step = {
  readonly actor: Actor;
  readonly label: string;
  /** The walk leaves it alone for long: a process that is starved, a network that is slow. */
  isAsleep: boolean;
  go(): void;
  fail(error: Error): void;
};

/** The call did not reach its server, or the transaction ended without a commit. */
export class CutOffError extends Error {
  override readonly name = 'CutOffError';
}

/** Code between two calls of a server takes fewer turns of the loop. */
const TURNS = 5;
/** A statement that takes longer may wait for a lock: PostgreSQL is asked, and again after twice the time, and so on. */
const PATIENCE_MS = 4;
const PATIENCE_MOST_MS = 64;
/** What is left after so many questions, in 19 s and more, never ends. */
const LOOKS_MAX = 300;

export type Interleaving = ReturnType<typeof createInterleaving>;

/** @param admin is asked who waits for whom */
export function createInterleaving(admin: AdminPool) {
  let held: Step[] = [];
  const flying = new Set<Flight>();
  /** Of these, the ones that are known to wait for a transaction that is open. */
  const blocked = new Set<Flight>();
  let changed = (): void => {};
  /** Calls that were answered, and transactions that ended: what was asked before is out of date. */
  let changes = 0;
  /** Calls of the append script that went out or were answered. */
  let appendCalls = 0;

  const anActor = (name: string): Actor => ({ name, isDead: false, clients: new Set() });

  /** Resolves when the walk says so: never for an actor that died meanwhile. */
  function hold(actor: Actor, label: string): Promise<void> {
    if (actor.isDead) return new Promise(() => {});
    return new Promise((resolve, reject) => {
      const leave = () => {
        held = held.filter((it) => it !== step);
      };
      const step: Step = {
        ...{ actor, label, isAsleep: false },
        go: () => {
          leave();
          resolve();
        },
        fail: (error) => {
          leave();
          reject(error);
        },
      };
      held.push(step);
      changed();
    });
  }

  /** Counts a call until it is answered. */
  async function fly<T>(what: string, call: () => Promise<T>, pid?: number): Promise<T> {
    const flight = { what, pid };
    flying.add(flight);
    const isAppend = what === 'appendInOrder';
    if (isAppend) appendCalls++;
    try {
      return await call();
    } finally {
      if (isAppend) appendCalls++;
      changes++;
      flying.delete(flight);
      blocked.delete(flight);
      changed();
    }
  }

  /** Returns when nothing moves any more: everything waits for the walk, or for a lock of what does. */
  async function settle(): Promise<void> {
    let quietTurns = 0;
    let patienceMs = PATIENCE_MS;
    for (let looks = 0; looks < LOOKS_MAX; ) {
      if ([...flying].every((it) => blocked.has(it))) {
        if (++quietTurns > TURNS) return;
        await nextTurn();
        continue;
      }
      quietTurns = 0;
      const inTime = await new Promise((resolve) => {
        const timer = setTimeout(resolve, patienceMs, false);
        changed = () => {
          clearTimeout(timer);
          resolve(true);
        };
      });
      if (inTime) continue;
      looks++;
      patienceMs = Math.min(2 * patienceMs, PATIENCE_MOST_MS);
      await findBlocked();
    }
    throw new Error(`never ends: ${[...flying].map(({ what, pid }) => `${what} (${pid})`).join('; ')}`);
  }

  async function findBlocked(): Promise<void> {
    const asked = [...flying].filter((it) => it.pid !== undefined);
    if (asked.length === 0) return;
    const askedAt = changes;
    const { rows } = await admin.query<{ pid: number; blockers: number[] }>(
      'SELECT pid, pg_blocking_pids(pid) AS blockers FROM unnest($1::int[]) AS pid',
      [asked.map((it) => it.pid)],
    );
    // A transaction that ended meanwhile may have freed those that waited for it.
    if (changes !== askedAt) return;
    const waits = new Set(rows.filter(({ blockers }) => blockers.length > 0).map(({ pid }) => pid));
    // Whoever waits, directly or not, for one that moves will move.
    const moves = new Set(asked.filter((it) => !waits.has(it.pid as number)).map((it) => it.pid));
    for (const _ of rows)
      for (const { pid, blockers } of rows) if (blockers.some((it) => moves.has(it))) moves.add(pid);
    for (const it of asked) if (!moves.has(it.pid)) blocked.add(it);
  }

  /** Locks may be free again: whoever waited for them is asked once more. */
  const locksChanged = (): void => {
    changes++;
    blocked.clear();
  };

  /** The store, whose calls wait: those in `gates` for the walk, `plain` ones for nothing, others until they are answered. */
  function gated<T extends object>(
    actor: Actor,
    name: string,
    store: T,
    { gates, plain = [] }: Readonly<{ gates: readonly (keyof T)[]; plain?: readonly (keyof T)[] }>,
    labelOf: (method: string, args: readonly unknown[]) => string = (method) => method,
  ): T {
    const entries = Object.entries(store).map(([method, value]) => {
      if (typeof value !== 'function' || plain.includes(method as keyof T)) return [method, value];
      const call = async (...args: unknown[]) => {
        if (gates.includes(method as keyof T)) await hold(actor, `${name}: ${labelOf(method, args)}`);
        return fly(`${name}: ${method}`, () => value(...args));
      };
      return [method, call];
    });
    return Object.fromEntries(entries) as T;
  }

  /** A pool for one actor: its transactions wait before they begin and before they commit. */
  function poolOf(actor: Actor, name: string, pool: pg.Pool): Pool {
    async function connect(): Promise<pg.PoolClient> {
      const client = await fly('connect', () => pool.connect());
      const pid = (client as pg.PoolClient & { processID: number }).processID;
      const mine: Client = { client, pid, isBusy: false, isReleased: false };
      actor.clients.add(mine);
      async function query(...args: unknown[]): Promise<unknown> {
        const [first] = args;
        const text = typeof first === 'string' ? first : (first as pg.QueryConfig).text;
        const [verb = ''] = text.split(/[\s;]/, 1);
        if (verb === 'BEGIN' || verb === 'COMMIT') await hold(actor, `${name}: ${verb.toLowerCase()}`);
        mine.isBusy = true;
        try {
          return await fly(
            text,
            () => (client.query as (...all: unknown[]) => Promise<unknown>)(...args),
            pid,
          );
        } finally {
          mine.isBusy = false;
          if (verb === 'COMMIT' || verb === 'ROLLBACK') locksChanged();
        }
      }
      const release = (error?: Error | boolean): void => {
        actor.clients.delete(mine);
        if (!mine.isReleased) client.release(error);
        mine.isReleased = true;
        locksChanged();
      };
      return {
        ...{ query, release },
        on: (...args: Parameters<typeof client.on>) => client.on(...args),
        off: (...args: Parameters<typeof client.off>) => client.off(...args),
      } as unknown as pg.PoolClient;
    }
    return {
      connect,
      async query(...args: unknown[]) {
        await hold(actor, `${name}: statement`);
        const client = await fly('connect', () => pool.connect());
        const pid = (client as pg.PoolClient & { processID: number }).processID;
        try {
          return await fly(
            'statement',
            () => (client.query as (...all: unknown[]) => Promise<unknown>)(...args),
            pid,
          );
        } finally {
          client.release();
          locksChanged();
        }
      },
    } as unknown as Pool;
  }

  /** Its process ends: what it waited for never comes, its transactions are undone. */
  async function kill(actor: Actor): Promise<void> {
    actor.isDead = true;
    held = held.filter((it) => it.actor !== actor);
    for (const mine of actor.clients) {
      if (mine.isReleased) continue;
      mine.isReleased = true;
      mine.client.removeAllListeners('error');
      mine.client.on('error', () => {});
      if (mine.isBusy) {
        await admin.query('SELECT pg_terminate_backend($1, 5000)', [mine.pid]);
        mine.client.release(true);
      } else {
        await mine.client.query('ROLLBACK');
        mine.client.release();
      }
    }
    actor.clients.clear();
    locksChanged();
    await settle();
  }

  return {
    ...{ anActor, hold, fly, settle, gated, poolOf, kill },
    held: (): readonly Step[] => held,
    appendCalls: () => appendCalls,
    async go(step: Step): Promise<void> {
      step.go();
      await settle();
    },
    async fail(step: Step, error: Error): Promise<void> {
      step.fail(error);
      await settle();
    },
  };
}
