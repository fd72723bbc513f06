import { randomUUID } from 'node:crypto';
import { expect, test } from 'vitest';
import { anEvent, insertEvents } from '../support/events.ts';
import { DLQ, setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

const TENANT = randomUUID();

const nested = (depth: number): string => (depth === 0 ? '"core"' : `{"in": [${nested(depth - 1)}]}`);

const PAYLOADS: Record<string, string> = {
  'numbers beyond 2^53 and their decimals':
    '{"big": 9007199254740993, "huge": 123456789012345678901234567890, "exact": 1.10, "tiny": 1e-400, "minus": -0}',
  'text of all planes': JSON.stringify({
    text: 'Grüße, Ελλάδα, 日本語, 🦊👩‍👩‍👧‍👦, 𝒳, \u{10ffff}, \u2028\u2029, \u0001\u001f, "quoted" \\ back / slash, \r\n\t',
    ключ: 'значение',
  }),
  'keys that mean something to JavaScript':
    '{"__proto__": {"polluted": true}, "constructor": 1, "toString": null, "hasOwnProperty": [], "": "empty key"}',
  'deep nesting': nested(120),
  'no object at all': '[1, "two", null]',
  'a bare string': '"just text"',
  null: 'null',
  'an empty object': '{}',
  'an empty string': '""',
  'numbers that no double holds': '{"a": 1e400, "b": 0.1000000000000000000001, "c": 1e-400}',
  'an escape that is text': '{"nul": "\\\\u0000", "\\\\u0000": 1}',
  'a character of every plane': JSON.stringify(
    Array.from({ length: 17 }, (_, plane) => String.fromCodePoint(plane * 0x10000 + 0xfffd)).join(''),
  ),
  'a tenant and a correlation': `{"tenant_id": "${TENANT}", "correlation_id": "${TENANT}"}`,
  'a tenant of the wrong type': '{"tenant_id": {"a": 1}, "correlation_id": ""}',
  'a tenant that is a number': '{"tenant_id": 7, "correlation_id": ["x"]}',
  'a tenant that is too long': JSON.stringify({
    tenant_id: 't'.repeat(900_000),
    correlation_id: 'c'.repeat(201),
  }),
};
const NO_TENANT = ['a tenant of the wrong type', 'a tenant that is a number', 'a tenant that is too long'];

test('payloads arrive byte for byte as PostgreSQL prints them', async () => {
  const stage = await setStage();
  await stage.pod();
  const events = Object.values(PAYLOADS).map((payload) => anEvent({ eventType: 'SomethingElse', payload }));
  events.push(anEvent({ eventType: 'SomethingElse', payload: { large: 'x€'.repeat(250_000) } }));
  await insertEvents(stage.pool, events);
  await stage.rested();
  const entries = new Map((await stage.entries()).map(({ fields }) => [fields.event_id, fields]));
  const rows = await stage.rows();
  expect(entries.size).toBe(rows.length);
  for (const row of rows) {
    const payload = entries.get(row.event_id)?.payload;
    expect(payload === row.payload, `payload of ${row.payload.slice(0, 60)}`).toBe(true);
  }
  const withTenant = entries.get(
    events[Object.keys(PAYLOADS).indexOf('a tenant and a correlation')]?.eventId,
  );
  expect(withTenant).toMatchObject({ tenant_id: TENANT, correlation_id: TENANT });
  for (const name of NO_TENANT) {
    const fields = entries.get(events[Object.keys(PAYLOADS).indexOf(name)]?.eventId);
    expect(fields?.tenant_id, name).toBe('00000000-0000-0000-0000-000000000000');
    expect(fields, name).not.toHaveProperty('correlation_id');
  }
  const plain = entries.get(events[0]?.eventId);
  expect(plain?.tenant_id).toBe('00000000-0000-0000-0000-000000000000');
  expect(plain).not.toHaveProperty('correlation_id');
});

test('a dead letter holds the payload byte for byte too', async () => {
  const stage = await setStage({ env: { RELAY_MAX_RETRY_ATTEMPTS: '0' } });
  await stage.redis.set('identity.broken.v1', 'a string');
  await stage.pod();
  const events = Object.values(PAYLOADS).map((payload) => anEvent({ payload, topic: 'identity.broken.v1' }));
  await insertEvents(stage.pool, events);
  await stage.rested();
  const deadLetters = new Map(
    (await stage.entries(DLQ)).map(({ fields }) => [fields.event_id, fields.payload]),
  );
  for (const row of await stage.rows()) expect(deadLetters.get(row.event_id)).toBe(row.payload);
});

test('a topic that can be no stream is dead-lettered at once with the reason, and no other key suffers', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, [anEvent()]);
  await stage.rested();
  const topics = [
    '',
    DLQ,
    'bull:relay-publish:wait',
    'bull:relay-publish:meta',
    'bull:relay-claim:id',
    'bull:',
  ];
  const typesBefore = await keyTypes();
  const bad = topics.map((topic) => anEvent({ topic }));
  const good = bad.map(({ aggregateId }) => anEvent({ aggregateId }));
  await insertEvents(stage.pool, [...bad, ...good]);
  await stage.rested();

  const deadLetters = new Map((await stage.entries(DLQ)).map(({ fields }) => [fields.event_id, fields]));
  expect(deadLetters.size).toBe(topics.length);
  for (const { eventId, topic } of bad) {
    const row = await stage.row(eventId);
    expect(row, `topic ${topic}`).toMatchObject({ published: false, attempts: 1 });
    expect(row.error_message, `topic ${topic}`).toMatch(
      /^topic (is empty|is the dead-letter|begins with bull:)/,
    );
    expect(deadLetters.get(eventId)).toMatchObject({
      topic,
      error_message: row.error_message,
      attempts: '1',
    });
  }
  for (const { eventId } of good) expect((await stage.row(eventId)).published).toBe(true);
  const typesAfter = await keyTypes();
  expect(typesAfter).toMatchObject(typesBefore);
  expect(Object.keys(typesAfter).filter((key) => topics.includes(key) && !(key in typesBefore))).toEqual([
    DLQ,
  ]);

  /** Type of each key that outlives a job. */
  async function keyTypes(): Promise<Record<string, string>> {
    const keys = (await stage.redis.keys('*')).filter((key) =>
      /:(meta|id|events|repeat)$|^identity/.test(key),
    );
    const types = await Promise.all(keys.map(async (key) => [key, await stage.redis.type(key)] as const));
    return Object.fromEntries(types);
  }
});

const SECRET_NAME = 'Rumpelstilzchen';
const bad = () =>
  anEvent({
    payload: {
      user_id: 'not a uuid',
      email: `${SECRET_NAME}@@example`,
      display_name: 7,
      status: SECRET_NAME,
      surprise: SECRET_NAME,
    },
  });

test('in strict mode a payload that breaks its schema is dead-lettered at once, every violation named and no value', async () => {
  const stage = await setStage({ env: { RELAY_VALIDATION: 'strict', RELAY_LOG_LEVEL: 'trace' } });
  const pod = await stage.pod();
  const event = bad();
  const successor = anEvent({ aggregateId: event.aggregateId });
  const unknownType = anEvent({ eventType: 'SomethingElse', payload: { any: 'thing' } });
  await insertEvents(stage.pool, [event, successor, unknownType]);
  await stage.rested();

  const row = await stage.row(event.eventId);
  expect(row).toMatchObject({ published: false, attempts: 1, dead_lettered_at: expect.any(Date) });
  for (const member of ['user_id', 'tenant_id', 'email', 'display_name', 'status', 'created_at', 'surprise'])
    expect(row.error_message).toMatch(new RegExp(`\\b${member}: `));
  const [deadLetter] = await stage.entries(DLQ);
  const { payload, ...others } = deadLetter?.fields ?? {};
  expect(payload).toBe(row.payload);
  expect(others.error_message).toBe(row.error_message);
  expect(JSON.stringify(others)).not.toContain(SECRET_NAME);
  expect(row.error_message).not.toContain(SECRET_NAME);
  expect(pod.lines.join('\n')).not.toContain(SECRET_NAME);
  expect((await stage.entries()).map(({ fields }) => fields.event_id).toSorted()).toEqual(
    [successor.eventId, unknownType.eventId].toSorted(),
  );
});

test('in warn mode such a payload is published and a warning logged without its values', async () => {
  const stage = await setStage({ env: { RELAY_VALIDATION: 'warn' } });
  const pod = await stage.pod();
  const event = bad();
  await insertEvents(stage.pool, [event]);
  await stage.rested();
  expect((await stage.entries()).map(({ fields }) => fields.event_id)).toEqual([event.eventId]);
  // One line for all that come within three seconds.
  const warning = await waitFor(
    () => pod.logs().find(({ level, eventIds }) => level === 'warn' && String(eventIds) === event.eventId),
    { what: 'the warning' },
  );
  expect(warning).toMatchObject({ events: 1, eventType: event.eventType });
  expect(JSON.stringify(warning)).toContain('tenant_id');
  expect(pod.lines.join('\n')).not.toContain(SECRET_NAME);
});

test('with validation off such a payload is published and nothing is said', async () => {
  const stage = await setStage({ env: { RELAY_VALIDATION: 'off' } });
  const pod = await stage.pod();
  const event = bad();
  await insertEvents(stage.pool, [event]);
  await stage.rested();
  expect((await stage.entries()).map(({ fields }) => fields.event_id)).toEqual([event.eventId]);
  expect(pod.logs().filter((line) => line.level === 'warn')).toEqual([]);
});
