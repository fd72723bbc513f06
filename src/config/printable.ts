/**
 * Texts that others have written, made fit to be shown. Event types, topics, error texts, reasons, names of pods
 * and consumer groups may hold anything: escape sequences that set a terminal's title or clipboard, a line break that
 * makes a line of its own, signs that reverse the direction of the text, or cannot be seen. Imports nothing.
 */

/** Controls, formats, surrogates, unassigned; what separates lines; what is not drawn. */
const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu;
const BLANKS = /[\t\n\v\f\r\x85\u2028\u2029]+/g;

/** The text in one line: line breaks and tabs are a blank, whatever else is not to be seen is escaped as in JSON. */
export const printable = (text: string): string => text.replace(BLANKS, ' ').replace(UNPRINTABLE, escaped);

/** The same JSON, its strings of the same values, with nothing in it that is not to be seen. */
export const printableJson = (json: string): string =>
  // Nearly every log line is plain: 3 µs instead of 16.
  PLAIN.test(json) ? json : json.replace(UNPRINTABLE_IN_JSON, escaped);

const PLAIN = /^[ -~\n]*$/;

/** In JSON text a line break is not within a string: that would be escaped already. */
const UNPRINTABLE_IN_JSON = /(?!\n)[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu;

const escaped = (character: string): string =>
  character
    .split('')
    .map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`)
    .join('');
