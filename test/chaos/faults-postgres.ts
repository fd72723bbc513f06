import pg from 'pg';
import { sampleEvent } from '../demo/sample.ts';
import { type Fault, SERVER_BACK_MS, type Undo } from './fault.ts';
import { LAG_MS, promoteLaggingStandby, truncate } from './forgetting.ts';
import { judgeBeforeErasing } from './grade.ts';
import { comesTrue, persistently } from './patience.ts';
import { between } from './random.ts';
import { POSTGRES_ROLE, PRODUCER_ROLE, type World } from './world.ts';

/** Longer than the deadline of the relay's statements (RELAY_PUBLISH_TIMEOUT, 10 s). */
const HANG_MS = 12_000;
/** More than the server will ever give away. */
const CONNECTIONS_MAX = 300;

const BURST_EVENTS = 500;

const terminateRelay = (world: World) =>
  world.sql('SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1', [POSTGRES_ROLE]);

/** Runs `lock` in a transaction that stays open until it is undone. */
async function holdLocks({ admin }: World, lock: string): Promise<Undo> {
  const session = await persistently(() => admin.connect());
  try {
    await session.query(`BEGIN; SET LOCAL lock_timeout = '20s'`);
    await session.query(lock);
  } catch (error) {
    session.release(true);
    throw error;
  }
  return async () => session.release(true);
}

/** Takes every connection that is left, and those that the relay loses meanwhile. */
async function takeAllConnections(world: World): Promise<Undo> {
  const taken: pg.Client[] = [];
  const takeWhatIsFree = async (): Promise<void> => {
    while (taken.length < CONNECTIONS_MAX) {
      const client = new pg.Client({ connectionString: world.producerUrl, application_name: 'greedy' });
      client.on('error', () => {});
      try {
        await client.connect();
      } catch (error) {
        // "too many clients already" or "remaining connection slots are reserved"
        if ((error as pg.DatabaseError).code === '53300') return;
        throw error;
      }
      taken.push(client);
    }
  };
  const giveBack = async (): Promise<void> => {
    await Promise.allSettled(taken.map((client) => client.end()));
  };
  try {
    await takeWhatIsFree();
    await terminateRelay(world);
    await takeWhatIsFree();
  } catch (error) {
    await giveBack();
    throw error;
  }
  return giveBack;
}

const isolated = (level: string): Fault => ({
  name: `postgres-${level.replace(' ', '-')}`,
  describe: `the database's default isolation level is ${level} for 10 s`,
  lane: 'postgres',
  lastsMs: 10_000,
  async inject(world) {
    await world.sql(`ALTER DATABASE postgres SET default_transaction_isolation = '${level}'`);
    // The setting is read when a session begins.
    await terminateRelay(world);
    return async () => {
      await world.sql('ALTER DATABASE postgres RESET default_transaction_isolation');
      await terminateRelay(world);
    };
  },
});

const RELAY_SESSIONS = 'SELECT FROM pg_stat_activity WHERE usename = $1';

/**
 * A session takes its role's setting when it begins, and follows the server's where the role has none. So those that are
 * there become read-only, and those that begin later are as they should be.
 */
async function spoilSessions(world: World): Promise<Undo> {
  const { sql } = world;
  const sessions = async () => (await sql(RELAY_SESSIONS, [POSTGRES_ROLE])).length;
  // Those that began in such a time before are immune.
  const before = await sessions();
  await terminateRelay(world);
  const areBack = async () => (await sessions()) >= before;
  await comesTrue(areBack, SERVER_BACK_MS);
  const ofRoles = async (setting: string): Promise<void> => {
    for (const role of [POSTGRES_ROLE, PRODUCER_ROLE]) await sql(`ALTER ROLE ${role} ${setting}`);
  };
  await ofRoles('SET default_transaction_read_only = off');
  await sql('ALTER SYSTEM SET default_transaction_read_only = on');
  await sql('SELECT pg_reload_conf()');
  return async () => {
    await sql('ALTER SYSTEM RESET default_transaction_read_only');
    await sql('SELECT pg_reload_conf()');
    await ofRoles('RESET default_transaction_read_only');
  };
}

export const postgresFaults: readonly Fault[] = [
  {
    name: 'postgres-restart',
    describe: 'immediate shutdown (SIGQUIT), started again after 2 s, crash recovery',
    lane: 'postgres',
    lastsMs: 2_000,
    recoveryMs: SERVER_BACK_MS,
    async inject({ postgres }) {
      await postgres.kill('SIGQUIT');
      return () => postgres.restart();
    },
  },
  {
    name: 'postgres-terminate',
    describe: "all of the relay's sessions are terminated, three times",
    lane: 'postgres',
    async inject(world, random) {
      for (let time = 0; time < 3; time++) {
        await terminateRelay(world);
        await new Promise((resolve) => setTimeout(resolve, between(random, 50, 500)));
      }
      return undefined;
    },
  },
  {
    name: 'postgres-full',
    describe: 'no connection is left for the relay, for 6 s',
    lane: 'postgres',
    lastsMs: 6_000,
    inject: takeAllConnections,
  },
  {
    name: 'postgres-table-locked',
    describe: 'statements hang: the table is locked for 12 s',
    lane: 'postgres',
    lastsMs: HANG_MS,
    inject: (world) => holdLocks(world, 'LOCK TABLE identity.outbox IN ACCESS EXCLUSIVE MODE'),
  },
  {
    name: 'postgres-rows-locked',
    describe: 'statements hang: the rows that are on their way are locked for 12 s',
    lane: 'postgres',
    lastsMs: HANG_MS,
    inject: (world) =>
      holdLocks(world, 'SELECT FROM identity.outbox WHERE NOT published ORDER BY id LIMIT 500 FOR UPDATE'),
  },
  isolated('repeatable read'),
  isolated('serializable'),
  {
    name: 'postgres-read-only',
    describe: 'every transaction is read-only for 5 s, as after a failover',
    lane: 'postgres',
    lastsMs: 5_000,
    async inject({ sql }) {
      await sql('ALTER SYSTEM SET default_transaction_read_only = on');
      await sql('SELECT pg_reload_conf()');
      return async () => {
        await sql('ALTER SYSTEM RESET default_transaction_read_only');
        await sql('SELECT pg_reload_conf()');
      };
    },
  },
  {
    name: 'postgres-sessions-read-only',
    describe: 'the sessions that are there become read-only for good; new ones are not',
    lane: 'postgres',
    lastsMs: 1_000,
    flowsMeanwhile: true,
    inject: spoilSessions,
  },
  {
    name: 'postgres-alter-type',
    describe: 'ALTER TYPE of a column, and back after 3 s: plans that sessions have kept are void',
    lane: 'postgres',
    lastsMs: 3_000,
    flowsMeanwhile: true,
    async inject({ sql }) {
      const becomes = (type: string) =>
        sql(`ALTER TABLE identity.outbox ALTER COLUMN event_type TYPE ${type}`);
      await becomes('varchar(200)');
      return () => becomes('text');
    },
  },
  {
    name: 'postgres-promotion',
    describe: `a standby that is ${LAG_MS / 1_000} s behind is promoted under the same address: rows are lost, ids come again`,
    lane: 'postgres',
    losesData: true,
    recoveryMs: SERVER_BACK_MS,
    async inject(world) {
      await promoteLaggingStandby(world);
      return undefined;
    },
  },
  {
    name: 'postgres-truncate',
    describe: 'TRUNCATE … RESTART IDENTITY, twice, while events are on their way: ids come again',
    lane: 'postgres',
    losesData: true,
    async inject(world) {
      await persistently(() => judgeBeforeErasing(world));
      await truncate(world);
      // On their way, with ids from 1 on, when these are given out again.
      await world.workload.write(
        Array.from({ length: BURST_EVENTS }, () => ({ ...sampleEvent(), topic: null })),
      );
      await truncate(world);
      return undefined;
    },
  },
];
