import { expect, test, vi } from 'vitest';
import { createTally } from '../../src/telemetry/tally.ts';
import { silent } from '../support/stages.ts';

test('what happens to many events within 3 s is one line, with their number and the first of them', () => {
  vi.useFakeTimers();
  const lines: unknown[] = [];
  const line = (level: string) => (fields: Record<string, unknown>, text: string) =>
    void lines.push([level, text, fields]);
  const tally = createTally({ ...silent, warn: line('warn'), error: line('error') });
  try {
    for (let i = 1; i <= 70; i++) tally.warn(`w${i}`, { reason: `r${i}` }, 'it happened');
    tally.warn('w1', { reason: 'once more' }, 'it happened'); // still 70 events
    tally.error('e', {}, 'something else');
    expect(lines).toEqual([]);
    vi.advanceTimersByTime(3_000);
    expect(lines).toEqual([
      ['warn', 'it happened', { events: 70, eventIds: ['w1', 'w2', 'w3'], reason: 'r1' }],
      ['error', 'something else', { events: 1, eventIds: ['e'] }],
    ]);
    tally.warn('last', {}, 'it happened');
    tally.flush();
    expect(lines.slice(2)).toEqual([['warn', 'it happened', { events: 1, eventIds: ['last'] }]]);
    vi.advanceTimersByTime(60_000);
    expect(lines).toHaveLength(3);
  } finally {
    vi.useRealTimers();
  }
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
