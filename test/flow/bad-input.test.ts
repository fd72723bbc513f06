/** Whoever may write the table may write anything: it is published checkpoint, or dead-lettered with a clear reason. */
import { readFile } from 'node:fs/promises';
import { expect, onTestFinished, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, type Entry, STREAM, type Stage, setStage } from '../support/flow.ts';
import { startProxy, through } from '../support/proxy.ts';
import { createDatabase } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const MIB = 1024 * 1024;
/** Unpacked 144 kB, in the table 2.5 kB; as text more than 1 GB, which PostgreSQL cannot print. */
const BOMB = '(SELECT jsonb_agg(1e131071::numeric) FROM generate_series(1, 9000))';
/** Within what is printed without a look at its numbers: 131 MB of text. */
const SMALL_BOMB = '(SELECT jsonb_agg(1e131071::numeric) FROM generate_series(1, 990))';

const fieldsById = (entries: readonly Entry[]) =>
  new Map(entries.map(({ fields }) => [fields.event_id, fields] as const));

const setPayload = (stage: Stage, eventId: string, expression: string) =>
  stage.pool.query(`UPDATE identity.outbox SET payload = ${expression} WHERE event_id = $1`, [eventId]);

test('an event may be as large as RELAY_MAX_EVENT_BYTES says; the payload of a larger one stays in the table', async () => {
  const stage = await setStage();
  const sized = (bytes: number) => {
    const event = anEvent({ eventType: 'Sized', topic: STREAM });
    const around = [event.eventType, event.aggregateType, STREAM, '{"x": ""}'].join('').length;
    return { ...event, payload: `{"x": "${'x'.repeat(bytes - around)}"}` };
  };
  const whole = sized(MIB);
  const large = sized(MIB + 1);
  const successor = anEvent({ aggregateId: large.aggregateId });
  const huge = anEvent({ payload: { x: 'x'.repeat(10 * MIB) } });
  const longType = anEvent({ eventType: 'T'.repeat(10 * MIB) });
  const longTopic = anEvent({ topic: 'ü'.repeat(5 * MIB) });
  await insertEvents(stage.pool, [whole, large, successor, huge, longType, longTopic]);
  const pod = await stage.pod({ RELAY_LOG_LEVEL: 'trace' });
  await stage.rested();

  const entries = fieldsById(await stage.entries());
  expect([...entries.keys()].toSorted()).toEqual([whole.eventId, successor.eventId].toSorted());
  expect(entries.get(whole.eventId)?.payload === whole.payload).toBe(true);
  const deadLetters = fieldsById(await stage.entries(DLQ));
  expect(deadLetters.size).toBe(4);
  for (const { eventId } of [large, huge, longType, longTopic]) {
    const row = await stage.row(eventId);
    expect(row.error_message).toMatch(
      /^event has (\d+|far too many) bytes; RELAY_MAX_EVENT_BYTES allows 1048576$/,
    );
    expect(row.attempts).toBe(1);
    const fields = deadLetters.get(eventId);
    expect(fields).toMatchObject({
      ...{ payload: 'null', error_message: row.error_message, original_event_id: eventId },
      payload_withheld: `the payload is in identity.outbox, id ${row.id}`,
    });
    expect(JSON.stringify(fields).length).toBeLessThan(3_000);
  }
  expect((await stage.row(large.eventId)).error_message).toContain(`has ${MIB + 1} bytes`);
  expect(deadLetters.get(longType.eventId)?.event_type).toBe(`${'T'.repeat(200)}...`);
  const failed = await stage.queue('publish').getFailed();
  for (const job of failed) expect(JSON.stringify(job).length).toBeLessThan(8_000);
  expect(Math.max(...pod.lines.map((line) => line.length))).toBeLessThan(4_000);
});

test('with a higher limit, payloads of 10 MB arrive checkpoint, and the memory of the pod stays bounded', async () => {
  const stage = await setStage({ env: { RELAY_MAX_EVENT_BYTES: '16000000', RELAY_CONCURRENCY: '2' } });
  const events = Array.from({ length: 8 }, (_, i) =>
    anEvent({ eventType: 'Large', payload: { i, text: `${'x€'.repeat(2_500_000)}${i}` } }),
  );
  for (const event of events) await insertEvents(stage.pool, [event]);
  const pod = await stage.pod();
  await stage.rested();
  const entries = fieldsById(await stage.entries());
  for (const { event_id, payload } of await stage.rows())
    expect(entries.get(event_id)?.payload === payload, `payload of ${event_id}`).toBe(true);
  const status = await readFile(`/proc/${pod.pid}/status`, 'utf8');
  // In the pod an event is there several times: as text, in its job, in the command that appends it.
  expect(Number(/VmHWM:\s+(\d+)/.exec(status)?.[1]) / 1024).toBeLessThan(700);
});

test('a payload that PostgreSQL cannot print stops nobody: it is dead-lettered, everything else arrives in order', async () => {
  const stage = await setStage();
  const before = someEvents(200);
  const bombs = [anEvent(), anEvent()];
  const [bomb, second] = bombs as [ReturnType<typeof anEvent>, ReturnType<typeof anEvent>];
  const same = (count: number) =>
    Array.from({ length: count }, () => anEvent({ aggregateId: bomb.aggregateId }));
  const ahead = same(5);
  const behind = same(5);
  const twin = { ...second, aggregateId: bomb.aggregateId };
  await insertEvents(stage.pool, [...before, ...ahead, bomb, twin, ...behind, ...someEvents(200)]);
  await setPayload(stage, bomb.eventId, BOMB);
  await setPayload(stage, twin.eventId, SMALL_BOMB);
  await stage.pod();
  await stage.rested();
  const deadLetters = fieldsById(await stage.entries(DLQ));
  expect([...deadLetters.keys()]).toEqual([bomb.eventId, twin.eventId]);
  expect(deadLetters.get(bomb.eventId)?.error_message).toMatch(
    /^event has far too many bytes; RELAY_MAX_EVENT/,
  );
  expect(deadLetters.get(twin.eventId)?.error_message).toMatch(
    /^event has 1297\d{5} bytes; RELAY_MAX_EVENT|^PostgreSQL (cannot|does not) print/,
  );
  const published = (await stage.entries()).map(({ fields }) => fields.event_id ?? '');
  expect(published).toHaveLength(410);
  const ofAggregate = [...ahead, ...behind].map((event) => event.eventId);
  expect(published.filter((id) => ofAggregate.includes(id))).toEqual(ofAggregate);
});

test('a payload that makes a claim or an acknowledgement fail is looked at alone; nobody waits for it, order is kept', async () => {
  const stage = await setStage();
  const deep = `${'['.repeat(4_000)}${']'.repeat(4_000)}`;
  const [failing, behindOne] = [anEvent({ payload: deep }), anEvent({ payload: deep })];
  const first = anEvent({ aggregateId: behindOne.aggregateId });
  const last = anEvent({ aggregateId: behindOne.aggregateId });
  await insertEvents(stage.pool, [...someEvents(200), failing, first, behindOne, last, ...someEvents(200)]);
  // Of the sessions to come: too little to look for numbers that deep. Printing needs less.
  await stage.pool.query(`DO $$ BEGIN
    EXECUTE format('ALTER DATABASE %I SET max_stack_depth = ''100kB''', current_database()); END $$`);
  const pod = await stage.pod();
  await stage.rested();
  expect(pod.lines.join('')).toContain('stack depth limit exceeded');
  await stage.expectPromisesHeld();
  const entries = fieldsById(await stage.entries());
  expect(entries.size).toBe(404);
  for (const { eventId } of [failing, behindOne]) expect(entries.get(eventId)?.payload === deep).toBe(true);
});

test('a topic is published as it is, or dead-lettered at once with the reason; no other key changes', async () => {
  const stage = await setStage({ env: { RELAY_ALLOWED_TOPICS: `${STREAM}, Identity.*, {*, x*, __*, a?b` } });
  const x512 = 'x'.repeat(512);
  const good = [
    STREAM,
    'Identity.user.v1',
    '{braces}{',
    '__proto__',
    x512,
    'a:b',
    'x"q\'$(reboot)',
    'x.ünï.🦊',
  ];
  const bad: Record<string, string> = {
    '': 'is empty',
    [DLQ]: 'is the dead-letter stream',
    'bull:relay-publish:wait': 'begins with bull:',
    'bull:relay:memory': 'begins with bull:',
    ' ': 'is not 1 to 512 printable characters without white space; it has 1: " "',
    'x with space': 'is not 1 to 512 printable',
    'x\nbreak': 'is not 1 to 512 printable characters without white space; it has 7: "x\\nbreak"',
    'x\u0007bell': 'is not 1 to 512 printable characters without white space; it has 6: "x\\u0007bell"',
    [`${x512}x`]: `is not 1 to 512 printable characters without white space; it has 513: "${'x'.repeat(60)}..."`,
    [`x${'y'.repeat(9_999)}`]: 'is not 1 to 512',
    'dictionary.word.v1': 'is none that RELAY_ALLOWED_TOPICS allows: "dictionary.word.v1"',
    'identity.user.v2': 'is none that RELAY_ALLOWED_TOPICS allows',
    'a::b': 'is none that RELAY_ALLOWED_TOPICS allows',
  };
  await stage.redis.mset({
    'Identity.user': 'theirs',
    'dictionary.word.v1': 'theirs',
    x: 'theirs',
    ' ': 'theirs',
  });
  await stage.pod();
  await insertEvents(stage.pool, [anEvent(), anEvent({ topic: null, eventType: '' })]);
  await stage.rested();
  const before = await keyTypes();
  const goodEvents = good.map((topic) => anEvent({ topic, eventType: 'constructor' }));
  const badEvents = Object.keys(bad).map((topic) => anEvent({ topic, eventType: '__proto__' }));
  await insertEvents(stage.pool, [...badEvents, ...goodEvents]);
  await stage.rested();

  for (const { eventId, topic } of goodEvents) {
    const entry = (await stage.entries(topic ?? '')).at(-1);
    expect(entry?.fields).toMatchObject({ event_id: eventId, topic, event_type: 'constructor' });
  }
  const deadLetters = fieldsById(await stage.entries(DLQ));
  expect(deadLetters.size).toBe(badEvents.length);
  for (const { eventId, topic } of badEvents) {
    const { error_message, attempts } = await stage.row(eventId);
    expect(error_message, topic ?? '').toContain(`topic ${bad[topic ?? '']}`);
    expect(error_message?.length).toBeLessThan(200);
    expect(attempts).toBe(1);
    expect(deadLetters.get(eventId)).toMatchObject({ topic, error_message, event_type: '__proto__' });
  }
  const after = await keyTypes();
  const added = Object.keys(after).filter((key) => !Object.hasOwn(before, key));
  expect(added.toSorted()).toEqual([DLQ, ...good.filter((topic) => topic !== STREAM)].toSorted());
  expect(after).toMatchObject(before);
  expect(await stage.redis.mget('Identity.user', 'dictionary.word.v1', 'x', ' ')).toEqual(
    Array(4).fill('theirs'),
  );

  /**
   * Type of each key but those that are there while they hold something (single jobs, lists of jobs, appends remembered), and
   * the one that comes with a heartbeat.
   */
  async function keyTypes(): Promise<Record<string, string>> {
    const keys = (await stage.redis.keys('*')).filter(
      (key) =>
        !/^bull:relay-(publish|claim):(?!(meta|id|events|repeat)$)|^bull:relay:(epoch:appended|streams)$/.test(
          key,
        ),
    );
    return Object.fromEntries(await Promise.all(keys.map(async (key) => [key, await stage.redis.type(key)])));
  }
});

test('payloads nested as deep as PostgreSQL takes them are published, and judged in strict mode', async () => {
  const stage = await setStage({ env: { RELAY_VALIDATION: 'strict' } });
  const nested = (depth: number) => `${'['.repeat(depth)}${']'.repeat(depth)}`;
  let depth = 500;
  for (let step = 8_000; step >= 1; step = Math.floor(step / 2)) {
    const fits = await stage.pool.query('SELECT $1::jsonb::text', [nested(depth + step)]).catch(() => null);
    if (fits !== null) depth += step;
  }
  depth -= 300; // the insert needs some of the stack itself
  const deep = anEvent({ eventType: 'Deep', payload: nested(depth) });
  const judged = anEvent({ payload: `{"user_id": ${nested(depth - 1)}}` });
  await insertEvents(stage.pool, [deep, judged]);
  await stage.pod();
  await stage.rested();
  const [entry, ...others] = await stage.entries();
  expect(others).toEqual([]);
  expect(entry?.fields.event_id, JSON.stringify(await stage.row(deep.eventId)).slice(0, 500)).toBe(
    deep.eventId,
  );
  expect(entry?.fields.payload === nested(depth)).toBe(true);
  expect((await stage.row(judged.eventId)).error_message).toMatch(
    /^payload breaks the schema of UserCreated: /,
  );
});

test('in a database in LATIN2 events flow, and are dead-lettered', async () => {
  const { adminUrl } = await createDatabase({ encoding: 'LATIN2' });
  const stage = await setStage({ databaseUrl: adminUrl, env: { RELAY_MAX_RETRY_ATTEMPTS: '0' } });
  await stage.redis.set('broken', 'no stream');
  expect((await stage.command(['migrate'])).code).toBe(0);
  await insertEvents(stage.pool, [...someEvents(20, 5), anEvent({ topic: 'broken' })]);
  expect((await stage.command(['check'])).code).toBe(0);
  await stage.pod();
  await stage.rested();
  expect(await stage.entries()).toHaveLength(20);
  expect(await stage.entries(DLQ)).toHaveLength(1);
  for (const command of [
    ['status'],
    ['dlq', 'list'],
    ['verify', '--since', '1h'],
    ['dlq', 'replay', '--all', '--yes'],
  ])
    expect((await stage.command(command)).code, command.join(' ')).toBe(0);
});

test('a database in SQL_ASCII holds bytes that are no UTF-8: their events are dead-lettered, the others arrive', async () => {
  const { adminUrl } = await createDatabase({ encoding: 'SQL_ASCII' });
  const stage = await setStage({ databaseUrl: adminUrl });
  expect((await stage.command(['migrate'])).code).toBe(0);
  const foreign = {
    payload: { payload: String.raw`('{"tenant_id": "' || E'caf\xe9' || '"}')::jsonb` },
    event_type: { event_type: String.raw`E'caf\xe9'` },
    topic: { topic: String.raw`E'x.caf\xe9'` },
    aggregate_type: { aggregate_type: String.raw`E'caf\xe9'` },
  };
  const bad = Object.keys(foreign).map((column) => ({ ...anEvent(), column }));
  const umlauts = anEvent({ eventType: 'Größe', payload: { ключ: '🦊' } });
  await insertEvents(stage.pool, [...someEvents(100), ...bad, umlauts, ...someEvents(100)]);
  for (const { eventId, column } of bad)
    for (const [name, value] of Object.entries(foreign[column as keyof typeof foreign]))
      await stage.pool.query(`UPDATE identity.outbox SET ${name} = ${value} WHERE event_id = $1`, [eventId]);
  await stage.pod();
  await stage.rested();

  const entries = fieldsById(await stage.entries());
  expect(entries.size).toBe(201);
  expect(entries.get(umlauts.eventId)).toMatchObject({ event_type: 'Größe', payload: '{"ключ": "🦊"}' });
  const deadLetters = fieldsById(await stage.entries(DLQ));
  expect(deadLetters.size).toBe(bad.length);
  for (const { eventId, column } of bad)
    expect(deadLetters.get(eventId)).toMatchObject({
      error_message: `${column} has bytes that are no UTF-8`,
      payload_withheld: expect.stringContaining('identity.outbox'),
    });
  expect(deadLetters.get(bad[1]?.eventId)?.event_type).toBe(String.raw`caf\351`);
  // Operators see them, and what is replayed dies of the same again.
  const listed = await stage.command(['dlq', 'list', '--json']);
  expect(listed.code, listed.lines.join('\n')).toBe(0);
  for (const { eventId } of bad) expect(listed.lines.join('')).toContain(eventId);
  expect((await stage.command(['dlq', 'replay', '--all', '--yes'])).code).toBe(0);
  await stage.rested();
  expect(await stage.count('dead_lettered_at IS NOT NULL')).toBe(bad.length);
  expect((await stage.command(['status'])).code).toBe(0);
});

test.each(['close', 'error'] as const)(
  'a Redis that takes no request above a size stops nobody but who is larger (it answers by: %s)',
  async (by) => {
    const stage = await setStage({ env: { RELAY_MAX_EVENT_BYTES: '4000000' } });
    const proxy = await startProxy(stage.server.port);
    onTestFinished(proxy.close);
    proxy.limit(MIB, by);
    const huge = anEvent({ payload: { x: 'x'.repeat(2 * MIB) } });
    // In its job, where it is written as a text, it is as large as the other.
    const quoting = anEvent({ payload: { x: '"'.repeat(MIB / 2) } });
    const behind = anEvent({ aggregateId: huge.aggregateId });
    const large = anEvent({ payload: { x: 'x'.repeat(MIB / 2) } });
    await insertEvents(stage.pool, [...someEvents(300), huge, quoting, behind, large, ...someEvents(300)]);
    const pod = await stage.pod({ RELAY_REDIS_URL: through(proxy, stage.env.RELAY_REDIS_URL) });
    await stage.rested();
    const entries = fieldsById(await stage.entries());
    expect(entries.size).toBe(602);
    expect(entries.has(behind.eventId)).toBe(true);
    expect(entries.get(large.eventId)?.payload?.length).toBeGreaterThan(MIB / 2);
    const deadLetters = fieldsById(await stage.entries(DLQ));
    expect([...deadLetters.keys()].toSorted()).toEqual([huge.eventId, quoting.eventId].toSorted());
    for (const [, fields] of deadLetters)
      expect(fields).toMatchObject({
        error_message: expect.stringMatching(
          by === 'close'
            ? /^Redis, or what is before it, closes the connection at this request of 2\d{6} bytes$/
            : /^Redis does not take its job of 2\d{6} bytes: ERR .*TOO_LARGE/,
        ),
        payload_withheld: expect.stringContaining('identity.outbox'),
      });
    // What is there was tried twice for each of them, not again and again.
    expect(pod.lines.filter((line) => line.includes('no connection to Redis')).length).toBeLessThan(12);
  },
);

test('jobs that are not the relay’s are ignored with a line in the log, whatever they hold; events flow past them', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '0.5', RELAY_FAILED_JOBS_KEPT: '1' } });
  const { redis } = stage;
  const [publish, claim] = [stage.queue('publish'), stage.queue('claim')];
  const { eventId, aggregateId, eventType, topic } = anEvent();
  const like = {
    ...{ id: '1', eventId, eventType, aggregateType: 'user', aggregateId, topic, payload: '{}', attempts: 0 },
    ...{ occurredAt: new Date().toISOString(), tenantId: null, correlationId: null, after: null },
  };
  const shapes: unknown[] = [
    ...[null, undefined, '', 'text', 7, true, [], [null], {}, { eventId: null }, { eventId: 'no uuid' }],
    ...[
      { eventId },
      { ...like, id: 1 },
      { ...like, id: 'x' },
      { ...like, payload: {} },
      { ...like, topic: 5 },
    ],
    ...[
      { ...like, aggregateId: null },
      { ...like, after: 'x' },
      { ...like, trace: 'x' },
      { ...like, attempts: '1' },
    ],
    like, // under another id than its own
  ];
  let foreign = 0;
  for (const data of shapes) {
    const options = { attempts: 3, backoff: 10, removeOnComplete: false };
    await publish.add('theirs', data as object, options);
    await publish.add('theirs', data as object, { ...options, jobId: `x${foreign++}` });
    await claim.add('theirs', data as object);
  }
  // As no BullMQ writes them: without options, without anything, with what is no JSON.
  for (const [i, fields] of [
    { name: 'x', data: 'null' },
    { data: '[1' },
    { name: 'x', opts: '{' },
    { x: '1' },
  ].entries())
    for (const queue of [publish, claim]) {
      await redis.hset(queue.toKey(`raw${i}`), fields);
      await redis.lpush(queue.toKey('wait'), `raw${i}`);
    }
  for (const queue of [publish, claim]) await redis.lpush(queue.toKey('wait'), 'nothing at all');
  await insertEvents(stage.pool, someEvents(200, 20));
  const pod = await stage.pod();
  await stage.rested();
  await insertEvents(stage.pool, someEvents(200, 20));
  await stage.rested();
  expect(await stage.entries()).toHaveLength(400);
  expect(await stage.entries(DLQ)).toEqual([]);
  const ignored = () =>
    pod.logs().filter(({ msg }) => /hold no event|nobody can read|none of the relay/.test(String(msg)));
  await waitFor(() => ignored().some(({ events }) => Number(events) > 1), {
    what: 'a line that counts them',
  });
  expect(ignored().filter(({ events }) => events !== undefined).length).toBeLessThan(8);
  // Nobody goes round and round with those that cannot be read.
  await waitFor(async () => (await publish.getJobCounts('waiting', 'active')).active === 0, {
    what: 'the queue to be empty',
  });
  expect(pod.logs().filter(({ level }) => level === 'error')).toEqual([]);
  await stage.expectPromisesHeld();
});

test('rows that are written as if they had jobs hold up neither others nor, for long, what is behind them', async () => {
  const stage = await setStage({ env: { RELAY_MAX_IN_FLIGHT: '40', RELAY_POLL_INTERVAL: '0.5' } });
  await stage.pod();
  const aggregates = Array.from({ length: 60 }, () => anEvent().aggregateId);
  // Until then the relay would leave them to their jobs.
  await stage.pool.query(
    `INSERT INTO identity.outbox (event_type, aggregate_id, payload, next_attempt_at)
     SELECT 'Later', aggregate_id, '{}', now() + interval '1 hour' FROM unnest($1::uuid[]) aggregate_id`,
    [aggregates],
  );
  await insertEvents(stage.pool, [
    ...aggregates.map((aggregateId) => anEvent({ aggregateId })),
    ...someEvents(20),
  ]);
  await stage.rested();
  await stage.expectPromisesHeld();
});

test.each([
  [
    'a constraint that was added NOT VALID',
    `ADD CONSTRAINT young CHECK (event_type <> 'Refused') NOT VALID`,
    'DROP CONSTRAINT young',
  ],
  ['a trigger that is deferred to the commit', 'ENABLE TRIGGER late', 'DISABLE TRIGGER late'],
])('rows that %s refuses to have changed stop no other', async (_, begins, ends) => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '0.5' } });
  const refused = [anEvent({ eventType: 'Refused' }), anEvent({ eventType: 'Refused' })];
  const behind = refused.map(({ aggregateId }) => anEvent({ aggregateId }));
  await insertEvents(stage.pool, [...refused, ...behind, ...someEvents(600, 100)]);
  await stage.pool.query(`
    CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'violates check constraint'; END $$;
    CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON identity.outbox DEFERRABLE INITIALLY DEFERRED
      FOR EACH ROW WHEN (NEW.event_type = 'Refused') EXECUTE FUNCTION no();
    ALTER TABLE identity.outbox DISABLE TRIGGER late; ALTER TABLE identity.outbox ${begins}`);
  const pod = await stage.pod();
  const othersLeft = () => stage.count(`NOT published AND next_attempt_at IS DISTINCT FROM 'infinity'`);
  await waitFor(async () => (await othersLeft()) === refused.length, { what: 'the others to be published' });
  await insertEvents(stage.pool, someEvents(600, 10));
  await waitFor(async () => (await othersLeft()) === refused.length, { what: 'those that come later, too' });
  const lines = () => pod.logs().filter((it) => /refuses to change fresh rows/.test(String(it.msg)));
  await waitFor(async () => lines().length > 0, { what: 'a line about the refused rows' });
  expect(lines()[0]).toMatchObject({
    ...{ level: 'error', err: { message: expect.stringContaining('violates check constraint') } },
    eventIds: expect.arrayContaining([refused[0]?.eventId]),
  });
  await stage.pool.query(`ALTER TABLE identity.outbox ${ends}`);
  // The pod would try them again after a minute; another one tries them at once.
  await pod.kill();
  await stage.pod();
  await stage.rested();
  await stage.expectPromisesHeld();
});
