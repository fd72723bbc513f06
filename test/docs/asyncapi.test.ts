import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { Ajv } from 'ajv';
import formats from 'ajv-formats';
import { expect, inject, test } from 'vitest';
import { parse } from 'yaml';
import { EVENT_SCHEMAS } from '../../src/streams/event-schemas.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { DLQ, type Entry, STREAM, setStage } from '../support/flow.ts';

const document = parse(readFileSync(join(inject('root'), 'docs/asyncapi.yaml'), 'utf8'), { merge: true });
const schemas = document.components.schemas;
const { schemas: specs } = createRequire(import.meta.url)('@asyncapi/specs') as {
  schemas: Record<string, object>;
};

function checker(schema: object, options: object = {}): (value: unknown) => string[] {
  const ajv = new Ajv({ strict: false, allErrors: true, ...options });
  formats.default(ajv);
  const validate = ajv.compile(schema);
  return (value) => {
    validate(value);
    return (validate.errors ?? []).map(({ instancePath, message, params }) =>
      [instancePath, message, JSON.stringify(params)].join(' '),
    );
  };
}

test('the document is what AsyncAPI’s own schema asks for', () => {
  // It has JSON Schema's own schema among its definitions.
  const violations = checker(specs[document.asyncapi] as object, { meta: false, validateSchema: false });
  expect(violations(document)).toEqual([]);
  expect(violations({ ...document, channels: { events: { address: 1 } } })).not.toEqual([]);
});

test('the payloads of the user events are described as they are checked', () => {
  for (const [eventType, { $schema: _, ...schema }] of Object.entries(EVENT_SCHEMAS)) {
    const { description: __, ...described } = schemas[eventType];
    expect(described, eventType).toEqual(schema);
  }
});

test('every entry that the relay writes is as the document says, and every field that it names is written', async () => {
  const refused = 'identity.broken.v1';
  const stage = await setStage({
    env: { RELAY_MAX_RETRY_ATTEMPTS: '1', RELAY_RETRY_BASE_DELAY: '0.1', RELAY_MAX_EVENT_BYTES: '2000' },
  });
  await stage.redis.set(refused, 'a string');
  await stage.pod();
  const metadata = {
    ...{ traceparent: '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01', tracestate: 'vendor=1' },
  };
  const rich = { tenant_id: 'a tenant', correlation_id: 'a correlation', metadata };
  await insertEvents(stage.pool, [
    anEvent(),
    anEvent({ eventType: 'UserMerged', payload: '{"tenant_id": 7, "big": 12345678901234567890}' }),
    anEvent({
      eventType: 'UserMerged',
      payload: JSON.stringify(rich),
    }),
    anEvent({ topic: refused, eventType: 'UserMerged', payload: JSON.stringify(rich) }),
    anEvent({ eventType: 'UserMerged', payload: JSON.stringify({ long: 'x'.repeat(3_000) }) }),
  ]);
  // Times that ISO 8601 writes in its long form, or not at all.
  await stage.pool.query(`
    INSERT INTO identity.outbox (event_type, aggregate_id, payload, created_at)
    SELECT 'UserMerged', gen_random_uuid(), '{}', at
      FROM unnest(array['0044-03-15 12:00:00+00 BC', 'infinity']::timestamptz[]) at`);
  await stage.rested();
  const { code, lines } = await stage.command(['republish', '--since', '1h', '--until', '0s', '--yes']);
  expect(code, lines.join('\n')).toBe(0);

  const events = await stage.entries(STREAM);
  const letters = await stage.entries(DLQ);
  expect(letters).toHaveLength(2);
  const isAsDescribed = (entries: readonly Entry[], schema: { properties: object; required: string[] }) => {
    const violations = checker(schema);
    for (const { fields } of entries) {
      expect(violations(fields)).toEqual([]);
      // A field more, or one less, is noticed.
      expect(violations({ ...fields, surprise: '1' })).not.toEqual([]);
      for (const name of schema.required) {
        const { [name]: _, ...rest } = fields;
        expect(violations(rest), name).not.toEqual([]);
      }
    }
    const written = new Set(entries.flatMap(({ fields }) => Object.keys(fields)));
    return Object.keys(schema.properties).filter((name) => !written.has(name));
  };
  expect(isAsDescribed(events, schemas.event)).toEqual([]);
  expect(isAsDescribed(letters, schemas.deadLetter)).toEqual([]);
  const { version } = document.info;
  expect(new Set(events.map(({ fields }) => fields.schema_version))).toEqual(
    new Set([version.split('.')[0]]),
  );
});
