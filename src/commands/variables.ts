import { Help } from 'commander';
import { type Property, type RelayConfig, VARIABLES } from '../config/config.ts';

/** Variables with default and meaning, for `--help`: two or three lines each, in `width` columns. */
export function describeVariables(width: number, which: (name: string) => boolean = () => true): string {
  return VARIABLES.filter(({ name }) => which(name))
    .map(({ name, default: defaultText, unit, description }) => {
      const value = unit === undefined ? defaultText : `${defaultText} ${unit}`;
      const fits = name.length + value.length + 6 <= width;
      const about = [...(fits ? [] : [`(${value})`]), ...wrapped(description, width - 6)];
      return [`  ${name}${fits ? `  (${value})` : ''}`, ...about.map((line) => `      ${line}`)].join('\n');
    })
    .join('\n');
}

/** `text` in lines of at most `width` columns, if that is at least 40. */
export const wrapped = (text: string, width: number): string[] => new Help().boxWrap(text, width).split('\n');

/** The configuration as the log may show it: without the secrets. */
export const settings = (config: RelayConfig): Record<string, unknown> => {
  const shown = VARIABLES.filter(({ secret }) => !secret).map(({ property }) => property as Property);
  return Object.fromEntries(shown.map((property) => [property, config[property]]));
};
