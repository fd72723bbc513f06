import type { NetworkLink } from '../support/proxy.ts';
import type { Fault } from './fault.ts';
import type { Links } from './fleet.ts';
import { pick } from './random.ts';

const SERVERS = { redis: 'Redis', postgres: 'PostgreSQL' } as const;
const DELAY_MS = 200;

type Server = keyof typeof SERVERS;
type Trouble = Readonly<{
  how: string;
  describe: string;
  lastsMs: number;
  begin(proxy: NetworkLink): unknown;
}>;

const TROUBLES: readonly Trouble[] = [
  {
    how: 'cut',
    describe: 'every connection is reset; new ones work',
    lastsMs: 0,
    begin: (proxy) => proxy.cut(),
  },
  {
    how: 'refused',
    describe: 'every connection is reset, new ones are refused for 6 s',
    lastsMs: 6_000,
    begin: (proxy) => proxy.refuse(),
  },
  {
    how: 'delayed',
    describe: `everything takes ${DELAY_MS} ms longer each way, for 6 s`,
    lastsMs: 6_000,
    begin: (proxy) => proxy.delay(DELAY_MS),
  },
  {
    how: 'half-open',
    describe: 'connections stay open and new ones are accepted, nothing gets through for 8 s',
    lastsMs: 8_000,
    begin: (proxy) => proxy.halfOpen(),
  },
];

function fault(server: Server, trouble: Trouble, whose: 'all' | 'one'): Fault {
  return {
    name: `net-${server}-${trouble.how}${whose === 'one' ? '-one-pod' : ''}`,
    describe: `between ${whose === 'one' ? 'one pod' : 'the pods'} and ${SERVERS[server]}: ${trouble.describe}`,
    lane: server,
    lastsMs: trouble.lastsMs,
    async inject({ fleet }, random) {
      const links: readonly Links[] =
        whose === 'all' ? fleet.links : [fleet.links[pick(random, fleet.slots)] as Links];
      const proxies = links.map((link) => link[server]);
      await Promise.all(proxies.map(trouble.begin));
      return trouble.lastsMs === 0 ? undefined : () => Promise.all(proxies.map((proxy) => proxy.heal()));
    },
  };
}

const [, , , halfOpen] = TROUBLES;

export const networkFaults: readonly Fault[] = (['redis', 'postgres'] as const).flatMap((server) => [
  ...TROUBLES.map((trouble) => fault(server, trouble, 'all')),
  ...(halfOpen ? [fault(server, halfOpen, 'one')] : []),
]);
