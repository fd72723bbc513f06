import { expect, test } from 'vitest';
import { printable, printableJson } from '../../src/config/printable.ts';

/** Each would move, hide, forge or do something in a terminal. */
const HOSTILE = [
  ...['\x00', '\x07', '\b', '\x1b', '\x7f', '\x80', '\x9b', '\x9d', '\xad'],
  ...['\u200b', '\u200c', '\u200d', '\u200e', '\u200f', '\u061c', '\u2060', '\ufeff', '\u180e', '\u034f'],
  ...['\u202a', '\u202b', '\u202c', '\u202d', '\u202e', '\u2066', '\u2067', '\u2068', '\u2069'],
  ...[
    '\u115f',
    '\u3164',
    '\uffa0',
    '\ufe0f',
    '\u{e0001}',
    '\u{e0041}',
    '\u{1d173}',
    '\ufff9',
    '\ue000',
    '\ud800',
  ],
];
const LINE_BREAKS = ['\n', '\r', '\r\n', '\v', '\f', '\x85', '\u2028', '\u2029'];

test('nothing is left that is not seen as what it is, and what is seen stays', () => {
  for (const character of HOSTILE) {
    const code = `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`;
    expect(printable(`a${character}b`), code).toMatch(/^a(\\u[0-9a-f]{4})+b$/);
  }
  for (const character of [...LINE_BREAKS, '\t']) expect(printable(`a${character}b`)).toBe('a b');
  expect(printable('\x1b]52;c;aGk=\x07')).toBe('\\u001b]52;c;aGk=\\u0007');
  for (const text of ['Straße', 'naïve', 'Ελληνικά', '日本語', 'עברית', '😀', '–', '"\\'])
    expect(printable(text)).toBe(text);
});

test('JSON stays JSON, of the same values, and its own line breaks stay', () => {
  const values = { [`k${HOSTILE.join('')}`]: HOSTILE, breaks: LINE_BREAKS, plain: 'Straße 😀' };
  for (const indent of [0, 2]) {
    const json = printableJson(`${JSON.stringify(values, null, indent)}\n`);
    expect(JSON.parse(json)).toEqual(values);
    expect(json).not.toMatch(/[^\n\P{C}]|\p{Default_Ignorable_Code_Point}|\u2028|\u2029/u);
  }
  expect(printableJson('{"a":"x"}\n')).toBe('{"a":"x"}\n');
});
