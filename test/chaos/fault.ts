import type { Random } from './random.ts';
import type { World } from './world.ts';

/** Who is hit. Faults of one lane come one after the other; those of different lanes overlap. */
export const LANES = ['pods', 'postgres', 'redis'] as const;
export type Lane = (typeof LANES)[number];

export type Undo = () => Promise<unknown>;

export type Fault = Readonly<{
  name: string;
  /** One line: what is done. */
  describe: string;
  lane: Lane;
  /** From the injection to its undoing. Default: none, it is over at once. */
  lastsMs?: number;
  /** A server loses data that it had confirmed. That both do at once is not promised to do no harm: they take turns. */
  losesData?: true;
  /** Events must flow while it lasts: the time to recover begins with it. */
  flowsMeanwhile?: true;
  /** Within this time after its end events must flow again. Default: 15 s. */
  recoveryMs?: number;
  /**
   * @returns how it is undone, unless it ends by itself
   * @throws when it could not be injected
   */
  inject(world: World, random: Random): Promise<Undo | undefined>;
}>;

export const RECOVERY_MS = 15_000;
/** A server that comes back is used again within this time. */
export const SERVER_BACK_MS = 10_000;
