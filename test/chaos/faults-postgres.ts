import pg from 'pg';
import { type Fault, SERVER_BACK_MS, type Undo } from './fault.ts';
import { persistently } from './patience.ts';
import { between } from './random.ts';
import { POSTGRES_ROLE, type World } from './world.ts';

/** Longer than the deadline of the relay's statements (RELAY_PUBLISH_TIMEOUT, 10 s). */
const HANG_MS = 12_000;
/** More than the server will ever give away. */
const CONNECTIONS_MAX = 300;

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
];
