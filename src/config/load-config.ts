/** Reads the environment: each variable by itself, then the defaults that depend on others, then what conflicts. */
import { type Property, type RelayConfig, TABLE } from './config.ts';
import { type ConfigProblem, conflicts } from './conflicts.ts';
import { redactUrls } from './connection-urls.ts';
import { placeConflicts, placeDefaults } from './redis-places.ts';
import { quoted } from './topics.ts';
import { ValueError } from './variable-kinds.ts';

/** The environment is wrong. The message has one line for each problem. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError';
  readonly problems: readonly ConfigProblem[];

  constructor(problems: readonly ConfigProblem[]) {
    super(problems.map(({ variable: name, problem }) => `${name}: ${problem}`).join('\n'));
    this.problems = problems;
  }
}

/**
 * Reads the configuration from `env`; no other variable of the environment matters to it. The only thing it touches
 * outside of its argument are the TLS files that a connection URL may point to.
 *
 * @throws {ConfigError} naming every wrong variable at once.
 */
export function loadConfig(env: Record<string, string | undefined>): RelayConfig {
  const problems: ConfigProblem[] = [];
  const values: Partial<Record<Property, unknown>> = {};
  for (const property of Object.keys(TABLE) as Property[]) {
    const result = readVariable(TABLE[property], env[TABLE[property].name]);
    if ('problem' in result) problems.push({ variable: TABLE[property].name, problem: result.problem });
    else values[property] = result.value;
  }
  const isGiven = (property: Property) => env[TABLE[property].name] !== undefined;
  fitDefaults(values, isGiven);
  problems.push(
    ...conflicts(values as Partial<RelayConfig>),
    ...placeConflicts(values as Partial<RelayConfig>, isGiven),
  );
  if (problems.length > 0) throw new ConfigError(problems);
  return Object.freeze(values) as RelayConfig;
}

function readVariable(
  described: (typeof TABLE)[Property],
  given: string | undefined,
): { value: unknown } | { problem: string } {
  const value = (given ?? described.default).trim();
  if (value === '') return { problem: 'is set but empty; remove it to use the default' };
  let expected: string;
  try {
    return { value: described.read(value) };
  } catch (error) {
    if (!(error instanceof ValueError)) throw error;
    expected = `expected ${error.message}`;
  }
  if ('secret' in described) return { problem: expected };
  return { problem: `${expected}; got ${quoted(redactUrls(value))}${kubernetesHint(value)}` };
}

/** A Service named `relay-http` makes Kubernetes set RELAY_HTTP_PORT=tcp://10.0.0.1:8004 in every pod. */
function kubernetesHint(value: string): string {
  return /^(?:tcp|udp):\/\//.test(value)
    ? ' (this looks like a variable that Kubernetes sets for a Service: set enableServiceLinks: false in the pod)'
    : '';
}

/**
 * Makes the defaults of the variables that are bounded by another one fit a value that was given for that one:
 * RELAY_MAX_IN_FLIGHT=10 alone is a good configuration, and so is RELAY_REDIS_CLUSTER=true.
 */
function fitDefaults(
  values: Partial<Record<Property, unknown>>,
  isGiven: (property: Property) => boolean,
): void {
  const { batchSize, maxInFlight } = values as Partial<RelayConfig>;
  const { publishTimeoutMs = Number.NaN, claimLeaseMs = Number.NaN } = values as Partial<RelayConfig>;
  if (!isGiven('batchSize') && batchSize !== undefined && maxInFlight !== undefined) {
    values.batchSize = Math.min(batchSize, maxInFlight);
  }
  if (!isGiven('maxBatchSize')) {
    if (isGiven('batchSize')) values.maxBatchSize = batchSize;
    else if (maxInFlight !== undefined)
      values.maxBatchSize = Math.min(Number(values.maxBatchSize), maxInFlight);
  }
  if (!isGiven('publishTimeoutMs') && publishTimeoutMs >= claimLeaseMs)
    values.publishTimeoutMs = Math.floor(claimLeaseMs / 2);
  Object.assign(values, placeDefaults(values as Partial<RelayConfig>, isGiven));
}
