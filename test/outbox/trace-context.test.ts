import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { createOutbox, type Outbox } from '../../src/outbox/outbox.ts';
import { appendEvent } from '../../src/outbox/producer.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { asRelay, PRODUCER_ROLE } from '../support/least-privilege.ts';
import { OUTBOX_OPTIONS } from '../support/outbox-table.ts';
import { createDatabase } from '../support/servers.ts';
import { type AdminPool, openAdminPool, openPool } from '../support/stages.ts';

const PARENT = '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01';
const OTHER = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00';
const MAX_EVENT_BYTES = 100_000;

let pool: AdminPool;
let producers: ReturnType<typeof openPool>;
let outbox: Outbox;

beforeAll(async () => {
  const { url, adminUrl } = await createDatabase();
  pool = openAdminPool(adminUrl);
  producers = openPool(asRelay(url, PRODUCER_ROLE));
  outbox = createOutbox(openPool(url), { ...OUTBOX_OPTIONS, maxEventBytes: MAX_EVENT_BYTES });
});

beforeEach(async () => {
  await pool.query(
    'TRUNCATE identity.outbox RESTART IDENTITY; ALTER TABLE identity.outbox DROP COLUMN IF EXISTS headers',
  );
});

const claim = async () => {
  const { leased } = await outbox.inEpoch((tx) => outbox.claimFresh(tx, 100));
  return leased;
};
const traceOf = async (payload: unknown) => {
  await insertEvents(pool, [
    anEvent({ payload: typeof payload === 'string' ? payload : JSON.stringify(payload) }),
  ]);
  const [event] = await claim();
  return event?.trace;
};
const addHeaders = (type = 'jsonb') => pool.query(`ALTER TABLE identity.outbox ADD COLUMN headers ${type}`);
/** The trace of an event whose row has this expression as its headers. */
const traceOfHeaders = async (headers: string, payload: unknown = {}) => {
  await insertEvents(pool, [anEvent({ payload: JSON.stringify(payload) })]);
  await pool.query(`UPDATE identity.outbox SET headers = ${headers}`);
  const [event] = await claim();
  return event?.trace;
};
const inMetadata = (metadata: unknown) => traceOf({ metadata });

describe("in its payload's metadata an event has", () => {
  test('its trace', async () => {
    expect(await inMetadata({ traceparent: PARENT })).toEqual({ traceparent: PARENT });
    expect(await inMetadata({ traceparent: OTHER, tracestate: 'a=1,b@c=t61rcWkgMzE' })).toEqual({
      traceparent: OTHER,
      tracestate: 'a=1,b@c=t61rcWkgMzE',
    });
  });

  test.each([
    ['of version ff', PARENT.replace(/^00/, 'ff')],
    ['of the trace zero', `00-${'0'.repeat(32)}-00f067aa0ba902b7-01`],
    ['of the span zero', `00-4bf92f3577b34da6a3ce929d0e0e4736-${'0'.repeat(16)}-01`],
    ['in capitals', PARENT.toUpperCase()],
    ['too long', `${PARENT}-00`],
    ['with a line feed', `${PARENT.slice(0, -1)}\n`],
    ['of other digits', PARENT.replace('4bf9', '４bf9')],
    ['that is a number', 1e300],
    ['that is an object', { traceparent: PARENT }],
    ['that is null', null],
    ['of 50,000 characters', '0'.repeat(50_000)],
  ])('no trace by a traceparent %s', async (_what, traceparent) => {
    expect(await inMetadata({ traceparent, tracestate: 'a=1' })).toBeNull();
  });

  test.each([
    ['too long', `a=${'x'.repeat(511)}`],
    ['empty', ''],
    ['with a line feed', 'a=1\nevent_id: 2'],
    ['of no member', 'nothing'],
    ['beyond ASCII', 'a=ü'],
    ['that is an array', ['a=1']],
  ])('a trace without its tracestate where that is %s', async (_what, tracestate) => {
    expect(await inMetadata({ traceparent: PARENT, tracestate })).toEqual({ traceparent: PARENT });
  });

  test('a tracestate of 512 characters', async () => {
    const tracestate = `a=${'x'.repeat(510)}`;
    expect(await inMetadata({ traceparent: PARENT, tracestate })).toEqual({
      traceparent: PARENT,
      tracestate,
    });
  });

  test.each([
    ['no object', '[1]'],
    ['null', 'null'],
    ['an object without metadata', '{"traceparent": "x"}'],
    ['one whose metadata are an array', '{"metadata": ["traceparent"]}'],
    [
      'one with numbers that print to megabytes',
      `{"metadata": {"traceparent": [${Array(5).fill('1e131071').join()}]}}`,
    ],
  ])('no trace where the payload is %s', async (_what, payload) => {
    expect(await traceOf(payload)).toBeNull();
  });
});

describe('of its headers an event has', () => {
  test('the trace, and not that of its payload', async () => {
    await addHeaders();
    expect(
      await traceOfHeaders(`'{"traceparent": "${PARENT}", "tracestate": "a=1"}'`, {
        metadata: { traceparent: OTHER, tracestate: 'b=2' },
      }),
    ).toEqual({ traceparent: PARENT, tracestate: 'a=1' });
  });

  test.each([
    ['null', 'NULL'],
    ['empty', `'{}'`],
    ['a text', `to_jsonb('${PARENT}'::text)`],
    ['an array', `'["traceparent"]'`],
    ['wrong', `'{"traceparent": "${PARENT}x"}'`],
    [
      'numbers that print to more than PostgreSQL can',
      `('{"traceparent": [' || repeat('1e131071, ', 20000) || '1]}')::jsonb`,
    ],
    [
      'larger than 8 kB',
      `jsonb_build_object('traceparent', '${PARENT}', 'x', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 1000) i))`,
    ],
  ])('none where they are %s; that of its payload then', async (_what, headers) => {
    await addHeaders();
    expect(await traceOfHeaders(headers, { metadata: { traceparent: OTHER } })).toEqual({
      traceparent: OTHER,
    });
  });

  test.each(['text', 'json', 'bytea', 'int[]'])('none where the column is of type %s', async (type) => {
    await addHeaders(type);
    const hostile = {
      text: `'${PARENT}'`,
      json: `'{"traceparent": "\\u0000"}'`,
      bytea: `'\\x00'`,
      'int[]': `'{1}'`,
    };
    expect(await traceOfHeaders(hostile[type as keyof typeof hostile])).toBeNull();
  });

  test('the trace as soon as the column is there, and none as soon as it is gone', async () => {
    expect(await inMetadata({})).toBeNull();
    await addHeaders();
    expect(await traceOfHeaders(`'{"traceparent": "${PARENT}"}'`)).toEqual({ traceparent: PARENT });
    await pool.query('ALTER TABLE identity.outbox DROP COLUMN headers');
    expect(await inMetadata({})).toBeNull();
  });

  test('the trace also where its payload is withheld, or it was parked', async () => {
    await addHeaders();
    const aggregateId = anEvent().aggregateId;
    const large = JSON.stringify({ text: 'x'.repeat(MAX_EVENT_BYTES) });
    await insertEvents(pool, [anEvent({ aggregateId, payload: large }), anEvent({ aggregateId })]);
    await pool.query(`UPDATE identity.outbox SET headers = '{"traceparent": "${PARENT}"}'`);
    await pool.query(`UPDATE identity.outbox SET next_attempt_at = 'infinity' WHERE id = 2`);
    const [first, second] = await claim();
    expect(first).toMatchObject({ withheld: expect.any(String), trace: { traceparent: PARENT } });
    expect(second).toMatchObject({ withheld: null, trace: { traceparent: PARENT } });
  });
});

test('a producer writes headers where the table has the column, and none otherwise', async () => {
  const client = await producers.connect();
  try {
    const event = { eventType: 'UserCreated', aggregateId: anEvent().aggregateId, payload: {} };
    await appendEvent(client, event);
    await expect(appendEvent(client, { ...event, headers: { traceparent: PARENT } })).rejects.toThrow();
    await addHeaders();
    // As `relay grants` prints it for such a table.
    await pool.query('GRANT INSERT (headers) ON identity.outbox TO PUBLIC');
    await appendEvent(client, { ...event, headers: { traceparent: PARENT, source: 'ünï' } });
    const { rows } = await pool.query(
      'SELECT headers, topic, aggregate_type FROM identity.outbox ORDER BY id',
    );
    expect(rows.at(-1)).toEqual({
      headers: { traceparent: PARENT, source: 'ünï' },
      topic: 'identity.user.v1',
      aggregate_type: 'user',
    });
  } finally {
    client.release();
  }
});
