/**
 * The epoch of one pod, as src/streams/epoch.ts has it, without its clock: the walk says when the pod looks. Its name
 * stands in the same key of Redis, and begins with the server's name, which a rollback changes.
 */
import type { Redis } from 'ioredis';
import { type Epoch, EpochOverError } from '../../src/streams/epoch.ts';
import type { Actor, Interleaving } from './interleaving.ts';

/** Names of epochs are given once. */
let epochs = 0;

/** What all pods see. */
export type EpochWorld = {
  readonly redis: Redis;
  readonly key: string;
  /** How often the server was started. */
  server: number;
  /** Told when an epoch ends; answers what to do when the next one begins. */
  onEnd: () => () => void;
};

export type ModelEpoch = ReturnType<typeof createModelEpoch>;

export function createModelEpoch(
  { hold, fly }: Pick<Interleaving, 'hold' | 'fly'>,
  actor: Actor,
  world: EpochWorld,
  recover: () => Promise<void>,
) {
  const { redis, key } = world;
  const checkerKey = `${key}:checker`;
  let epoch: string | undefined;
  let ended: string | undefined;
  let isLooking = false;
  let isChecker = false;

  const isOfServer = (name: string | null) => name?.startsWith(`server${world.server}:`) === true;

  /** Ends the epoch, compares, and begins the next one, unless the server or the epoch changed meanwhile. */
  async function renew(): Promise<void> {
    const { server } = world;
    const guard = `checking:${++epochs}`;
    await hold(actor, 'epoch: end');
    const onBegun = world.onEnd();
    await fly('epoch', () => redis.set(key, guard));
    await fly('epoch', () => redis.del(`${key}:last-entries`));
    await recover();
    await hold(actor, 'epoch: begin');
    if (world.server !== server || (await fly('epoch', () => redis.get(key))) !== guard) return;
    const next = `server${server}:${++epochs}`;
    await fly('epoch', () => redis.set(key, next));
    onBegun();
    epoch = next;
  }

  async function renewAlone(): Promise<void> {
    if ((await fly('epoch', () => redis.set(checkerKey, actor.name, 'NX'))) === null) return;
    isChecker = true;
    try {
      await renew();
    } finally {
      isChecker = false;
      await fly('epoch', () => redis.del(checkerKey));
    }
  }

  async function identify(): Promise<void> {
    if (ended !== undefined && (await fly('epoch', () => redis.get(key))) === ended)
      await fly('epoch', () => redis.del(key));
    ended = undefined;
    const found = await fly('epoch', () => redis.get(key));
    if (isOfServer(found)) epoch = found as string;
    else await renewAlone();
  }

  async function looking(work: () => Promise<void>): Promise<void> {
    isLooking = true;
    try {
      await work();
    } finally {
      isLooking = false;
    }
  }

  return {
    start() {},
    stop: async () => {},
    current: () => epoch,
    known: async () => epoch,
    reason: () => '',
    async confirm(of: string) {
      if (epoch !== of) throw new EpochOverError();
      await hold(actor, 'epoch: confirm');
      const found = await fly('epoch', () => redis.get(key));
      if (found === of && epoch === of) return;
      if (epoch === of) epoch = undefined;
      throw new EpochOverError();
    },
    invalidate() {
      epoch = undefined;
    },
    endFor(of: string) {
      if (epoch !== of) return;
      ended = of;
      epoch = undefined;
    },

    /** The connection to the server is lost. */
    forget() {
      epoch = undefined;
      ended = undefined;
    },
    isLooking: () => isLooking,
    isChecker: () => isChecker,
    /** Takes the epoch that is there, or makes one. */
    look: () => looking(identify),
    /** Ends the epoch, though nothing is known to be lost. */
    end: () => looking(renewAlone),
  } satisfies Epoch & Record<string, unknown>;
}
