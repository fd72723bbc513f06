import { expect, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, setStage } from '../support/flow.ts';

const WORDS = 'dictionary.word.v1';

test('relay verify tells what is missing, appends it again on demand, and leaves alone what was trimmed', async () => {
  const stage = await setStage({ env: { RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_RETRY_ATTEMPTS: '0' } });
  await stage.redis.set('broken', 'a string');
  const pod = await stage.pod();
  await insertEvents(stage.pool, [
    ...someEvents(60, 6),
    ...someEvents(20, 2, { topic: WORDS }),
    anEvent({ topic: 'broken' }),
  ]);
  await stage.rested();
  const verify = async (...args: string[]) => {
    const { code, lines } = await stage.command(['verify', '--since', '1h', '--json', ...args]);
    return { code, ...JSON.parse(lines.find((line) => line.startsWith('{')) ?? '{}') };
  };
  const clean = { lost: 0, restored: 0, trimmed: 0, refused: 0 };
  expect(await verify()).toMatchObject({
    code: 0,
    streams: {
      [STREAM]: { rows: 60, ...clean },
      [WORDS]: { rows: 20, ...clean },
      [DLQ]: { rows: 1, ...clean },
    },
  });

  await stage.redis.xtrim(STREAM, 'MAXLEN', 50);
  const entries = await stage.entries();
  const lost = entries.slice(30, 40);
  await stage.redis.xdel(STREAM, ...lost.map(({ entryId }) => entryId));
  const [word] = await stage.entries(WORDS);
  await stage.redis.xdel(WORDS, ...(await stage.entries(WORDS)).slice(5).map(({ entryId }) => entryId));
  const missing = {
    code: 1,
    streams: { [STREAM]: { lost: 10, trimmed: 10 }, [WORDS]: { lost: 15 }, [DLQ]: clean },
    total: { rows: 81, lost: 25, restored: 0 },
  };
  expect(await verify()).toMatchObject(missing);
  expect(await verify('--topic', WORDS)).toMatchObject({ code: 1, total: { rows: 20, lost: 15 } });
  expect(await verify('--until', word?.fields.occurred_at ?? '')).toMatchObject({
    code: 0,
    total: { rows: 0 },
  });
  // Looking changes nothing.
  expect(await stage.redis.xlen(STREAM)).toBe(40);

  expect(await verify('--repair', '--topic', STREAM)).toMatchObject({
    code: 0,
    total: { lost: 10, restored: 10 },
  });
  const byAggregate = (them: typeof entries) =>
    them
      .toSorted((a, b) => (a.fields.aggregate_id as string).localeCompare(b.fields.aggregate_id as string))
      .map(({ fields }) => fields.event_id);
  expect(byAggregate((await stage.entries()).slice(-10))).toEqual(byAggregate(lost));
  expect(await stage.redis.xlen(WORDS)).toBe(5);
  await pod.kill();
  expect(await verify('--repair')).toMatchObject({ code: 0, total: { lost: 15, restored: 15 } });
  expect(await verify()).toMatchObject({ code: 0, total: { lost: 0, trimmed: 10 } });
}, 90_000);

test('relay verify says in words what it found, and what it needs', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, someEvents(3));
  await stage.rested();
  expect((await stage.command(['verify', '--since', '600'])).lines.join('\n')).toMatch(
    /3 +3 +0 +0 +0 +0 +identity\.user\.v1\nNothing is missing\./,
  );
  await stage.redis.xdel(STREAM, ...(await stage.entries()).slice(1).map(({ entryId }) => entryId));
  const found = await stage.command(['verify', '--since', '10m']);
  expect(found.code).toBe(1);
  expect(found.lines.join('\n')).toMatch(/2 entries are missing: "relay verify --repair"/);
  const repaired = await stage.command(['verify', '--since', '10m', '--repair']);
  expect(repaired.code).toBe(0);
  expect(repaired.lines.join('\n')).toMatch(/2 of 2 missing entries were appended again/);
  for (const since of ['yesterday', '', '5y']) {
    const { code, lines } = await stage.command(['verify', '--since', since]);
    expect(code).toBe(1);
    expect(lines.join('\n')).toMatch(/Expected a time like/);
  }
}, 60_000);
