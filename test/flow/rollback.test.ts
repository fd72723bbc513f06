/** Redis comes back without its last entries, or with another's: they are there again before anything new is. */
import { dirname } from 'node:path';
import { expect, test } from 'vitest';
import { cutAof, endOfAof } from '../support/aof.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { startLoad } from '../support/load.ts';
import { createRedis } from '../support/servers.ts';
import { openAdminRedis } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const QUICK_DEATH = { RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '1' };
const BROKEN = 'identity.broken.v1';

const entriesOf = (stage: Stage, stream = STREAM) => stage.redis.xlen(stream);

test('a power cut under load that costs Redis its last second costs no event, and doubles none', async () => {
  const stage = await setStage({ env: QUICK_DEATH });
  const folder = dirname(stage.server.logFile);
  await stage.redis.set(BROKEN, 'a string');
  await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(1_000, 50));
  const load = startLoad(stage.pool);
  for (let round = 1; round <= 3; round++) {
    const before = await entriesOf(stage);
    await waitFor(async () => (await entriesOf(stage)) > before + 200, { what: 'the load to flow' });
    const kept = await endOfAof(folder);
    await insertEvents(stage.pool, [...someEvents(10, 10, { topic: BROKEN }), ...someEvents(500, 100)]);
    const reached = await entriesOf(stage);
    await waitFor(async () => (await entriesOf(stage)) > reached + 300, { what: 'entries to be lost' });
    await waitFor(async () => (await stage.count('dead_lettered_at IS NOT NULL')) === 10 * round, {
      what: 'the dead letters',
    });
    await stage.server.kill('SIGKILL');
    await cutAof(folder, kept);
    await stage.server.restart();
  }
  await load.stop();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade.deadLetters).toBe(30);
});

test('after a restart without loss nothing is appended again', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  await insertEvents(stage.pool, someEvents(300, 30));
  await stage.rested();
  await stage.server.restart();
  // The first comparison was made when the pod found no epoch.
  const compared = () => pod.logs().filter(({ lost }) => lost !== undefined);
  await waitFor(() => compared().length === 2, { what: 'the comparison' });
  expect(compared()[1]).toMatchObject({ lost: 0, unpublished: 0 });
  await insertEvents(stage.pool, someEvents(50, 5));
  await stage.rested();
  await stage.expectPromisesHeld();
});

test('entries that a consumer’s owner trimmed are not brought back by a restart', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, someEvents(100, 10));
  await stage.rested();
  await stage.redis.xtrim(STREAM, 'MAXLEN', 20);
  await stage.server.restart();
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await stage.rested();
  expect(await entriesOf(stage)).toBe(21);
});

test('a stream that somebody deleted is there again, in order, before its next event', async () => {
  const stage = await setStage();
  await Promise.all([stage.pod(), stage.pod()]);
  await insertEvents(stage.pool, someEvents(200, 10));
  await stage.rested();
  await stage.redis.del(STREAM);
  await insertEvents(stage.pool, someEvents(50, 5));
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade.entries).toBe(250);
});

test('a stream that somebody deletes while nothing is published is there again within seconds', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '3600' } });
  await Promise.all([stage.pod(), stage.pod()]);
  const topics = [STREAM, 'dictionary.word.v1'];
  for (const topic of topics) await insertEvents(stage.pool, someEvents(200, 10, { topic }));
  await stage.rested();
  await stage.redis.del(STREAM);
  await waitFor(async () => (await entriesOf(stage)) === 200, {
    what: 'the stream to be there again',
  });
  // A consumer that finds no stream makes an empty one.
  await stage.redis.multi().del(STREAM).xgroup('CREATE', STREAM, 'mailer', '0', 'MKSTREAM').exec();
  await waitFor(async () => (await entriesOf(stage)) === 200, {
    what: 'the stream to be there again, in place of the empty one',
  });
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ entries: 400, deadLetters: 0 });
});

test('a stream that is deleted under load, and made anew by a consumer, has every event again, once and in order', async () => {
  const stage = await setStage();
  await Promise.all([stage.pod(), stage.pod()]);
  // Few enough for each aggregate to be hot.
  const load = startLoad(stage.pool, { aggregates: 8 });
  const flows = async (what: string) => {
    const before = await stage.count('published');
    await waitFor(async () => (await stage.count('published')) > before + 200, { what });
  };
  for (let round = 1; round <= 3; round++) {
    await flows(`the load to flow before loss ${round}`);
    const deleted = stage.redis.multi().del(STREAM);
    if (round > 1) deleted.xgroup('CREATE', STREAM, 'mailer', '0', 'MKSTREAM');
    await deleted.exec();
  }
  await flows('the load to flow after the losses');
  await load.stop();
  await stage.rested();
  const grade = await stage.expectPromisesHeld();
  expect(grade).toMatchObject({ entries: load.written(), deadLetters: 0 });
  expect(await stage.count('attempts > 0')).toBe(0);
});

test('a loss while no pod runs is mended by the next pod, for as long as the window says', async () => {
  const stage = await setStage({ env: { RELAY_RESYNC_WINDOW: '600' } });
  const pod = await stage.pod();
  await insertEvents(stage.pool, someEvents(100, 10));
  await stage.rested();
  await stage.pool.query(
    `UPDATE identity.outbox SET published_at = published_at - interval '1 hour' WHERE id <= 40`,
  );
  await pod.kill();
  await stage.redis.flushall();
  await stage.pod();
  await insertEvents(stage.pool, [anEvent()]);
  await stage.rested();
  expect(await entriesOf(stage)).toBe(61);
});

test('a replica that takes over without the last entries gets them, though no connection breaks', async () => {
  const stage = await setStage();
  const replica = await createRedis({ args: ['--replicaof', '127.0.0.1', String(stage.server.port)] });
  await waitFor(async () => /slave0:.*state=online/.test(await stage.redis.info('replication')), {
    what: 'the replica to be in step',
  });
  await stage.pod();
  await insertEvents(stage.pool, someEvents(100, 10));
  await stage.rested();
  const other = openAdminRedis(replica.adminUrl);
  try {
    // What comes now does not reach the replica.
    await other.call('REPLICAOF', 'NO', 'ONE');
    await insertEvents(stage.pool, someEvents(100, 10));
    await stage.rested();
    // The old master gets the replica's data, and becomes the master again: the same address, another history.
    await stage.redis.call('REPLICAOF', '127.0.0.1', String(replica.port));
    await waitFor(async () => /master_link_status:up/.test(await stage.redis.info('replication')), {
      what: 'the old master to have the data of the new one',
    });
    expect(await entriesOf(stage)).toBeLessThan(200);
    await stage.redis.call('REPLICAOF', 'NO', 'ONE');
  } finally {
    other.disconnect();
  }
  await waitFor(async () => (await entriesOf(stage)) === 200, { what: 'the entries to be there again' });
  await insertEvents(stage.pool, someEvents(50, 5));
  await stage.rested();
  await stage.expectPromisesHeld();
});
