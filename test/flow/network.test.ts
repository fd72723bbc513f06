import { expect, onTestFinished, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { type NetworkLink, startProxy, through } from '../support/proxy.ts';
import { waitFor } from '../support/wait.ts';

/** As long as it lasts, and as long as the flow may take to resume after it. */
const FAULT_MS = 8_000;
/** 10 s with the machine to itself, as `npm run chaos -- --each` measures it; here four test files share two cores. */
const RECOVERY_MS = 30_000;

const hold = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

type Server = 'Redis' | 'PostgreSQL';

/** Two pods whose way to a server leads through a proxy, under load, when something happens to it. */
async function suffer(server: Server, happen: (proxy: NetworkLink) => Promise<void>): Promise<Stage> {
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
  await insertEvents(stage.pool, someEvents(1_000, 300));
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 200, {
    what: 'the load to flow',
    timeoutMs: RECOVERY_MS,
  });

  await happen(proxy);
  await expectFlow(stage, RECOVERY_MS);
  await load.stop();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade.deadLetters).toBe(0);
  expect(await stage.count('attempts > 0 OR error_message IS NOT NULL'), 'events it cost an attempt').toBe(0);
  return stage;
}

/** An event that is written now is published within so long. */
async function expectFlow(stage: Stage, withinMs: number): Promise<void> {
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await waitFor(async () => (await stage.row(event.eventId)).published, {
    what: 'the flow to resume',
    timeoutMs: withinMs,
  });
}

for (const server of ['Redis', 'PostgreSQL'] as const) {
  test(`a network to ${server} that is half-open for a while costs nothing, and is replaced by a new one`, async () => {
    await suffer(server, async (proxy) => {
      proxy.halfOpen();
      await hold(FAULT_MS);
      await proxy.heal();
    });
  }, 120_000);

  test(`connections to ${server} that are cut again and again cost nothing`, async () => {
    await suffer(server, async (proxy) => {
      for (let i = 0; i < 6; i++) {
        proxy.cut();
        await hold(500);
      }
    });
  }, 120_000);

  test(`answers of ${server} that take 300 ms, and connections that break meanwhile, cost nothing`, async () => {
    await suffer(server, async (proxy) => {
      proxy.delay(300);
      await hold(3_000);
      proxy.cut();
      await hold(3_000);
      await proxy.heal();
    });
  }, 120_000);

  test(`old connections to ${server} that are dead for ever are found out while new ones are fine`, async () => {
    await suffer(server, async (proxy) => {
      proxy.loseTrack();
    });
  }, 120_000);
}

test('a pod that is cut off from PostgreSQL while it has the claim lock holds up the others no longer than 15 s', async () => {
  const stage = await setStage();
  const proxy = await startProxy(Number(new URL(stage.databaseUrl).port));
  onTestFinished(proxy.close);
  await stage.pod({ RELAY_DATABASE_URL: through(proxy, stage.env.RELAY_DATABASE_URL) });
  const load = startLoad(stage.pool);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) > 100, {
    what: 'the load to flow',
    timeoutMs: RECOVERY_MS,
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
}, 90_000);
