import { expect, onTestFinished, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { type NetworkLink, startProxy, through } from '../support/proxy.ts';
import { waitFor } from '../support/wait.ts';

/** As long as it lasts, and as long as the flow may take to resume after it. */
const FAULT_MS = 8_000;

const hold = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

type Server = 'Redis' | 'PostgreSQL';

/** What happens to the way to a server. */
const FAULTS: Readonly<Record<string, (proxy: NetworkLink) => Promise<void>>> = {
  'half-open for a while': async (proxy) => {
    proxy.halfOpen();
    await hold(FAULT_MS);
    await proxy.heal();
  },
  'connections that are cut again and again': async (proxy) => {
    for (let i = 0; i < 6; i++) {
      proxy.cut();
      await hold(500);
    }
  },
  'answers that take 300 ms, and connections that break meanwhile': async (proxy) => {
    proxy.delay(300);
    await hold(3_000);
    proxy.cut();
    await hold(3_000);
    await proxy.heal();
  },
  'old connections that are dead for ever, while new ones are fine': async (proxy) => {
    proxy.loseTrack();
  },
};

/** Two pods whose way to a server leads through a proxy, under load, when one thing after the other happens to it. */
async function suffer(server: Server): Promise<void> {
  const stage = await setStage();
  const [variable, url, port] =
    server === 'Redis'
      ? (['RELAY_REDIS_URL', stage.env.RELAY_REDIS_URL, stage.server.port] as const)
      : ([
          'RELAY_DATABASE_URL',
          stage.env.RELAY_DATABASE_URL,
          Number(new URL(stage.databaseUrl).port),
        ] as const);
  const proxy = await startProxy(port);
  onTestFinished(proxy.close);
  const env = { [variable]: through(proxy, url) };
  await Promise.all([stage.pod(env), stage.pod(env)]);
  const load = startLoad(stage.pool);
  for (const [what, happen] of Object.entries(FAULTS)) {
    await insertEvents(stage.pool, someEvents(1_000, 300));
    const reached = await stage.redis.xlen(STREAM);
    await waitFor(async () => (await stage.redis.xlen(STREAM)) > reached + 200, {
      what: `${what}: the load to flow`,
    });
    await happen(proxy);
    await expectFlow(stage, what);
    const cost = await stage.count('attempts > 0 OR error_message IS NOT NULL');
    expect(cost, `${what}: events it cost an attempt`).toBe(0);
  }
  await load.stop();
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ deadLetters: 0 });
  expect(await stage.count('attempts > 0 OR error_message IS NOT NULL')).toBe(0);
}

/** An event that is written now is published. */
async function expectFlow(stage: Stage, what: string): Promise<void> {
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).published, {
    what: `${what}: the flow to resume`,
  });
}

test.each(['Redis', 'PostgreSQL'] as const)(
  'a network to %s that is half-open, cuts, delays or forgets connections costs nothing, and is replaced by a new one',
  suffer,
);

test('a pod that is cut off from PostgreSQL while it has the claim lock holds up the others no longer than 15 s', async () => {
  const stage = await setStage();
  const proxy = await startProxy(Number(new URL(stage.databaseUrl).port));
  onTestFinished(proxy.close);
  await stage.pod({ RELAY_DATABASE_URL: through(proxy, stage.env.RELAY_DATABASE_URL) });
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 100, {
    what: 'the load to flow',
  });
  await stage.pod();
  const isClaiming = async () => {
    const { rowCount } = await stage.pool.query(
      `SELECT FROM pg_locks WHERE relation = 'identity.relay_claim_lock'::regclass AND granted
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
    );
    return (rowCount ?? 0) > 0;
  };
  // Not more: the event below is claimed after them, at the rate of one pod.
  await insertEvents(stage.pool, someEvents(1_000, 10));
  await waitFor(isClaiming, { what: 'a pod to claim', pollMs: 5 });
  proxy.halfOpen();
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).next_attempt_at !== null, {
    what: 'the other pod to claim',
    timeoutMs: 15_000,
  });
  await load.stop();
});
