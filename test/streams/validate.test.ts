import { Ajv2020 } from 'ajv/dist/2020.js';
import { describe, expect, test } from 'vitest';
import { EVENT_SCHEMAS } from '../../src/streams/event-schemas.ts';
import { createValidator } from '../../src/streams/validate.ts';

const validate = createValidator();
const violations = (eventType: string, payload: unknown) => validate(eventType, JSON.stringify(payload));

const USER = '3f0b6f0e-9d55-4b53-9a0a-0f7b0c0d1e2f';
const common = { user_id: USER, tenant_id: USER, email: 'ada@example.com' };
const good: Record<string, Record<string, unknown>> = {
  UserCreated: { ...common, display_name: 'Ada', status: 'active', created_at: '2024-01-01T00:00:00Z' },
  UserUpdated: {
    ...common,
    display_name: null,
    status: 'disabled',
    updated_at: '2024-01-01T00:00:00.123456+00:00',
    changed_fields: ['email'],
  },
  UserDisabled: { ...common, disabled_at: '2024-01-01T00:00:00Z', disabled_by: USER, reason: 'admin_action' },
};
const eventTypes = Object.keys(good);

test.each(Object.entries(EVENT_SCHEMAS))('the schema of %s is a JSON schema', (_, schema) => {
  const ajv = new Ajv2020({ strict: false });
  expect(ajv.validateSchema(schema), ajv.errorsText()).toBe(true);
});

describe('good payloads', () => {
  test.each(eventTypes)('%s with its required members passes', (eventType) => {
    expect(violations(eventType, good[eventType])).toEqual([]);
  });

  test.each(['UserCreated', 'UserUpdated'])('%s with all its optional members passes', (eventType) => {
    const optional = {
      ...{ first_name: 'Ada', last_name: null, is_verified: true, is_admin: false, mfa_enabled: true },
      correlation_id: USER,
    };
    expect(violations(eventType, { ...good[eventType], ...optional })).toEqual([]);
  });

  test('each reason to disable a user passes, with or without a display name', () => {
    for (const reason of ['admin_action', 'self_deletion', 'security_violation', 'policy_violation']) {
      expect(violations('UserDisabled', { ...good.UserDisabled, reason })).toEqual([]);
      expect(violations('UserDisabled', { ...good.UserDisabled, reason, display_name: null })).toEqual([]);
    }
  });

  test.each([
    'DictionaryWordAdded',
    'usercreated',
    '',
    '__proto__',
    'constructor',
    'toString',
    'hasOwnProperty',
  ])('an event type without a schema passes, whatever its payload: %j', (eventType) => {
    expect(validate(eventType, '{"anything": [1]}')).toEqual([]);
    expect(validate(eventType, 'not even JSON')).toEqual([]);
  });
});

describe('bad payloads', () => {
  test.each(eventTypes)('%s: each required member is missed', (eventType) => {
    for (const member of Object.keys(good[eventType] ?? {})) {
      const { [member]: _, ...rest } = good[eventType] ?? {};
      expect(violations(eventType, rest)).toEqual([`${member}: is missing`]);
    }
  });

  test.each(eventTypes)('%s: a member of the wrong type is named', (eventType) => {
    for (const member of Object.keys(good[eventType] ?? {})) {
      const found = violations(eventType, { ...good[eventType], [member]: { deep: 1 } });
      expect(found.length).toBeGreaterThan(0);
      for (const violation of found) expect(violation).toMatch(new RegExp(`^${member}: must be `));
    }
  });

  const cases: [string, Record<string, unknown>, string[]][] = [
    ['UserCreated', { email: 'nobody' }, ['email: must be in the format email']],
    ['UserCreated', { user_id: '17' }, ['user_id: must be in the format uuid']],
    ['UserCreated', { created_at: '2024-01-01 00:00' }, ['created_at: must be in the format date-time']],
    ['UserCreated', { status: 'gone' }, ['status: must be one of active, disabled']],
    ['UserCreated', { is_admin: 'yes' }, ['is_admin: must be boolean']],
    ['UserCreated', { display_name: 5 }, ['display_name: must be string or null']],
    ['UserCreated', { updated_at: '2024-01-01T00:00:00Z' }, ['updated_at: is not allowed']],
    ['UserUpdated', { created_at: '2024-01-01T00:00:00Z' }, ['created_at: is not allowed']],
    [
      'UserUpdated',
      { changed_fields: ['a', 1, null] },
      ['changed_fields/1: must be string', 'changed_fields/2: must be string'],
    ],
    ['UserDisabled', { disabled_by: '' }, ['disabled_by: must be in the format uuid']],
    ['UserDisabled', { first_name: 'Ada' }, ['first_name: is not allowed']],
    [
      'UserDisabled',
      { reason: 'bored' },
      ['reason: must be one of admin_action, self_deletion, security_violation, policy_violation'],
    ],
    [
      'UserDisabled',
      { email: 'x', disabled_by: 'y', extra: 1 },
      [
        'disabled_by: must be in the format uuid',
        'email: must be in the format email',
        'extra: is not allowed',
      ],
    ],
  ];
  test.each(cases)('%s with %j', (eventType, change, expected) => {
    expect(violations(eventType, { ...good[eventType], ...change }).sort()).toEqual(expected);
  });

  test.each(['null', '[]', '"text"', '17', 'true'])(
    'a payload that is no object is refused: %s',
    (payload) => {
      expect(validate('UserCreated', payload)).toEqual(['payload: must be object']);
    },
  );

  test('a payload that is not JSON is refused', () => {
    expect(validate('UserCreated', '{"email": ')).toEqual(['payload: is not JSON']);
  });

  test('a member called __proto__ is seen', () => {
    const json = JSON.stringify(good.UserCreated).replace('{', '{"__proto__": {"x": 1}, ');
    expect(validate('UserCreated', json)).toEqual(['__proto__: is not allowed']);
  });

  test('one bad payload does not change the result on the next', () => {
    expect(violations('UserCreated', {})).not.toEqual([]);
    expect(violations('UserCreated', good.UserCreated)).toEqual([]);
  });
});

describe('what a violation tells', () => {
  test('no value of the payload', () => {
    const secret = 's3cr3t';
    for (const eventType of eventTypes) {
      const payload = Object.fromEntries(
        Object.keys(good[eventType] ?? {}).map((member) => [member, secret]),
      );
      const found = violations(eventType, { ...payload, changed_fields: [[secret], { [secret]: secret }] });
      expect(found.length).toBeGreaterThan(3);
      expect(found.join('\n')).not.toContain(secret);
    }
  });

  test('a bounded number of members', () => {
    const many = Object.fromEntries(Array.from({ length: 5_000 }, (_, i) => [`${i}${'x'.repeat(1_000)}`, i]));
    const found = violations('UserCreated', { ...good.UserCreated, ...many });
    expect(found).toHaveLength(51);
    expect(found.at(-1)).toBe('and 4950 more');
    expect(Math.max(...found.map((violation) => violation.length))).toBeLessThan(150);
  });

  test('no name that is none: it may be personal data, or control a terminal', () => {
    for (const name of ['ada@example.org', '\u001b[31m\n\u202ered', '+49 30 123456', 'x'.repeat(41)]) {
      const found = violations('UserCreated', { ...good.UserCreated, [name]: 1 });
      expect(found).toEqual(['a member whose name is not shown: is not allowed']);
    }
  });
});
