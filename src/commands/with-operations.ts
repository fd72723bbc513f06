import type { RelayConfig } from '../config/config.ts';
import { type Operations, openOperations } from '../operations/open.ts';
import { withServers } from './command.ts';

/** `withServers`, for what operators do with dead letters and published events. */
export const withOperations = (
  config: RelayConfig,
  command: string,
  work: (operations: Operations) => Promise<number>,
): Promise<number> =>
  withServers(config, command, async (servers) => {
    const operations = openOperations(config, servers);
    try {
      return await work(operations);
    } finally {
      await operations.close();
    }
  });
