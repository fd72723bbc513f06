import type { Fault } from './fault.ts';
import { networkFaults } from './faults-network.ts';
import { operatorFaults } from './faults-operators.ts';
import { podFaults } from './faults-pods.ts';
import { postgresFaults } from './faults-postgres.ts';
import { redisFaults } from './faults-redis.ts';

export const FAULTS: readonly Fault[] = [
  ...podFaults,
  ...postgresFaults,
  ...redisFaults,
  ...networkFaults,
  ...operatorFaults,
];

/** @throws naming what is unknown */
export function faultsNamed(names: readonly string[]): Fault[] {
  return names.map((name) => {
    const fault = FAULTS.find((it) => it.name === name);
    if (fault === undefined) throw new Error(`there is no fault "${name}"; --list names them`);
    return fault;
  });
}
