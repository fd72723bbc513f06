import { describe, expect, test } from 'vitest';
import { createEventCheck } from '../../src/publish/event-check.ts';
import { aClaimedEvent } from '../support/stages.ts';

type Deps = Parameters<typeof createEventCheck>[0];

const createCheck = (deps: Partial<Deps> = {}) =>
  createEventCheck({
    topicProblem: () => null,
    violations: () => [],
    strict: true,
    assertPermitted: async () => {},
    keyTypeProblem: async () => undefined,
    tally: { warn: () => {} },
    ...deps,
  });

describe('an event', () => {
  test('with which nothing is wrong has no problem', () => {
    const asked: string[] = [];
    const check = createCheck({
      violations: (eventType, payload) => {
        asked.push(eventType, payload);
        return [];
      },
    });
    const event = aClaimedEvent({ payload: '{"a": 1}', withheld: null });
    expect(check.problemOf(event)).toBeNull();
    expect(asked).toEqual([event.eventType, '{"a": 1}']);
  });

  test('whose payload was withheld has the reason of that, and its payload is not looked at', () => {
    const check = createCheck({
      violations: () => {
        throw new Error('looked at');
      },
    });
    expect(check.problemOf(aClaimedEvent({ withheld: 'event has 9 bytes' }))).toBe('event has 9 bytes');
  });

  test('with an impossible topic has the reason of that', () => {
    const check = createCheck({ topicProblem: (topic) => `${topic} is no stream` });
    expect(check.problemOf(aClaimedEvent({ topic: 'x' }))).toBe('x is no stream');
  });

  test('whose payload breaks its schema has every violation named in strict mode, its type cut short', () => {
    const check = createCheck({ violations: () => ['email: is missing', 'x: is not allowed'] });
    expect(check.problemOf(aClaimedEvent())).toBe(
      'payload breaks the schema of UserCreated: email: is missing; x: is not allowed',
    );
    const { length } = check.problemOf(aClaimedEvent({ eventType: 'x'.repeat(9_000) })) ?? '';
    expect(length).toBeLessThan(400);
  });

  test('whose payload breaks its schema is published otherwise, with a warning', () => {
    const warned: unknown[] = [];
    const warn: Deps['tally']['warn'] = (eventId, fields) => void warned.push({ eventId, ...fields });
    const violations = ['email: is missing'];
    const check = createCheck({
      ...{ violations: () => violations, strict: false, tally: { warn } },
    });
    const event = aClaimedEvent();
    expect(check.problemOf(event)).toBeNull();
    expect(warned).toEqual([{ eventId: event.eventId, eventType: event.eventType, violations }]);
  });
});

describe('a refusal', () => {
  const refused = (reason: string, assertPermitted: Deps['assertPermitted']) =>
    createCheck({ assertPermitted }).refusedEverything(aClaimedEvent(), reason);
  const everything = () => Promise.reject(new Error('NOPERM no permissions to run set'));

  test.each(['NOPERM No permissions to access a key', "ACL failure in script: can't run this command"])(
    'for want of permission (%s) is about everything when Redis refuses that, too, else about the event’s stream',
    async (reason) => {
      expect(await refused(reason, everything)).toBe('NOPERM no permissions to run set');
      expect(await refused(reason, async () => {})).toBeNull();
    },
  );

  test('for another reason is about the event: nothing more is asked', async () => {
    let asked = 0;
    const reason = 'ERR The ID specified in XADD is equal or smaller than the target stream top item';
    const count = async () => void asked++;
    expect([await refused(reason, count), asked]).toEqual([null, 0]);
  });

  test('since a key has another type is about the event, unless it is one of the keys of the relay', async () => {
    const reason = 'WRONGTYPE Operation against a key holding the wrong kind of value';
    const event = aClaimedEvent();
    const named = createCheck({ keyTypeProblem: async () => 'the key it is' });
    expect(await named.refusedEverything(event, reason)).toBe('the key it is');
    expect(await createCheck().refusedEverything(event, reason)).toBeNull();
  });
});
