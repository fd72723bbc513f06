import { expect, test, vi } from 'vitest';
import { createTally, type Tally } from '../../src/telemetry/tally.ts';
import { silent } from '../support/stages.ts';

type Told = [level: string, text: string, fields: Record<string, unknown>];

/** Runs on a clock of its own, and keeps what is logged but for `debug`. */
function onFakeClock(work: (tally: Tally, lines: Told[]) => void): void {
  vi.useFakeTimers();
  const lines: Told[] = [];
  const line = (level: string) => (fields: Record<string, unknown>, text: string) =>
    void lines.push([level, text, fields]);
  try {
    work(createTally({ ...silent, info: line('info'), warn: line('warn'), error: line('error') }), lines);
  } finally {
    vi.useRealTimers();
  }
}

test('what happens to many events within 3 s is one line, with their number and the first of them', () => {
  onFakeClock((tally, lines) => {
    for (let i = 1; i <= 70; i++) tally.warn(`w${i}`, { reason: 'r' }, 'it happened');
    tally.warn('w1', { reason: 'r' }, 'it happened'); // still 70 events
    tally.error('e', {}, 'something else');
    vi.advanceTimersByTime(2_999);
    expect(lines).toEqual([]);
    vi.advanceTimersByTime(1);
    expect(lines).toEqual([
      ['warn', 'it happened', { events: 70, eventIds: ['w1', 'w2', 'w3'], reason: 'r' }],
      ['error', 'something else', { events: 1, eventIds: ['e'] }],
    ]);
    tally.warn('last', {}, 'it happened');
    tally.flush();
    expect(lines.slice(2)).toEqual([['warn', 'it happened', { events: 1, eventIds: ['last'] }]]);
    vi.advanceTimersByTime(60_000);
    expect(lines).toHaveLength(3);
  });
});

test('each topic, reason, attempt and error has a line of its own, also of the same event', () => {
  onFakeClock((tally, lines) => {
    const text = 'publishing failed; retries are scheduled';
    const wrong = { topic: 'a.wrong', attempt: 1, reason: 'no such topic' };
    const billing = { topic: 'billing2.v1', attempt: 1, reason: 'WRONGTYPE' };
    const again = { ...wrong, attempt: 2 };
    tally.info('a', wrong, text);
    tally.info('b', billing, text);
    tally.info('a', again, text);
    tally.info('c', billing, text);
    for (const message of ['refused', 'away']) tally.error('d', { err: new Error(message) }, 'not recorded');
    vi.advanceTimersByTime(3_000);
    expect(lines).toEqual([
      ['info', text, { events: 1, eventIds: ['a'], ...wrong }],
      ['info', text, { events: 2, eventIds: ['b', 'c'], ...billing }],
      ['info', text, { events: 1, eventIds: ['a'], ...again }],
      ['error', 'not recorded', { events: 1, eventIds: ['d'], err: new Error('refused') }],
      ['error', 'not recorded', { events: 1, eventIds: ['d'], err: new Error('away') }],
    ]);
  });
});

test('10,000 reasons make twenty lines, and one without a reason for all that is left', () => {
  onFakeClock((tally, lines) => {
    for (let i = 1; i <= 10_000; i++) tally.info(`e${i}`, { topic: 't', reason: `of e${i}` }, 'it failed');
    tally.info('known', { topic: 't', reason: 'of e1' }, 'it failed');
    tally.info('other', {}, 'something else');
    vi.advanceTimersByTime(3_000);
    expect(lines).toHaveLength(22);
    expect(lines[0]).toEqual([
      'info',
      'it failed',
      { events: 2, eventIds: ['e1', 'known'], topic: 't', reason: 'of e1' },
    ]);
    expect(lines[20]).toEqual(['info', 'it failed', { events: 9_980, eventIds: ['e21', 'e22', 'e23'] }]);
    expect(lines[21]).toEqual(['info', 'something else', { events: 1, eventIds: ['other'] }]);
  });
});

test('the lines that wait are written before a line about one of their events, and not before that of another', () => {
  const lines: string[] = [];
  const tally = createTally({ ...silent, info: (_, text) => void lines.push(text) });
  tally.info('a', {}, 'it happened');
  tally.flushFor('b');
  expect(lines).toEqual([]);
  tally.flushFor('a');
  expect(lines).toEqual(['it happened']);
});
