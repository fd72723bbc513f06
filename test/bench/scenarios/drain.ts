/** A backlog of 20,000 events drained by each contender: the relay between its limits and what others use. */
import type pg from 'pg';
import { openCard } from '../contenders/card.ts';
import { openGraphileWorker } from '../contenders/graphile-worker.ts';
import { openNoop } from '../contenders/noop.ts';
import { openPgTransactionalOutbox } from '../contenders/pg-transactional-outbox.ts';
import { openPoller } from '../contenders/poller.ts';
import { openRawXadd } from '../contenders/raw-xadd.ts';
import { CLI_BEFORE, openRelay } from '../contenders/relay.ts';
import { cpuFigures, cpuRatio, inTurns, rateFigures, type Scenario, SLOW_MOST } from '../scenario.ts';
import { PLATFORM_INDEXES } from '../workload.ts';

export const DRAIN: Scenario = {
  name: 'drain',
  describe: 'a backlog, by the relay and by every other contender, in turns',
  minutes: 3,
  async run(context) {
    const { options, undo, progress } = context;
    const { events = options.quick ? 5_000 : 20_000 } = options;
    const workload = { events, aggregates: options.aggregates ?? events };
    progress.now('starting servers and contenders');
    const servers = await context.open();
    const indexes = options.platformIndexes ? PLATFORM_INDEXES : '';
    const prepare = async (pool: pg.Pool) => void (await pool.query(indexes));
    const relay = await openRelay(servers, { name: 'relay', describe: 'one pod, ordered', prepare }, undo);
    const sample = await relay.sampleJob(workload);
    const before =
      CLI_BEFORE === undefined
        ? []
        : [
            await openRelay(
              servers,
              { name: 'relay before', describe: `one pod of ${CLI_BEFORE}`, cli: CLI_BEFORE, prepare },
              undo,
            ),
          ];
    const payload = JSON.stringify(sample.data.payload ?? 'x'.repeat(250));
    const contenders = [
      relay,
      ...before,
      await openNoop(servers, sample, undo),
      await openCard(servers, undo, { indexes }),
      await openPoller(servers, undo),
      await openRawXadd(servers, payload, undo),
      await openGraphileWorker(servers, 'in order', undo),
      await openGraphileWorker(servers, 'no order', undo),
      await openPgTransactionalOutbox(servers, 'as documented', undo),
      await openPgTransactionalOutbox(servers, 'tuned', undo),
    ];
    const drained = await inTurns(
      context,
      contenders.map((contender) => ({ contender, workload })),
    );
    const runsOf = (name: string) => drained.get(name) ?? [];
    const ratios = [
      ...contenders.slice(1).map(({ name }) => ['relay', name] as const),
      // Those whose sides were not both measured are left out.
      ...['card', 'relay before'].map((name) => [name, 'no-op queue'] as const),
    ];
    const slow = contenders.filter(({ isSlow }) => isSlow).map(({ name }) => name);
    return {
      about: `${events.toLocaleString('en')} events of ${workload.aggregates.toLocaleString('en')} aggregates`,
      figures: [
        ...rateFigures(drained, ratios),
        ...cpuFigures('relay', runsOf('relay')),
        cpuRatio("CPU of a pod / CPU of the no-op queue's process", runsOf('relay'), runsOf('no-op queue')),
        ...before.flatMap(({ name }) => [
          ...cpuFigures(name, runsOf(name)),
          cpuRatio('CPU of a pod / CPU of a pod before', runsOf('relay'), runsOf(name)),
        ]),
      ],
      verified:
        'every event of the relay, the poller, graphile-worker in order and pg-transactional-outbox once, in the order of ' +
        'its aggregate, in every run; every event of card and of graphile-worker without order once; of raw XADD ' +
        'and the no-op queue, that as many came out as went in',
      notes: [
        ...contenders.map(({ name, describe }) => `${name}: ${describe}`),
        ...(indexes ? ['the tables of relay and card have the six indexes of the old system'] : []),
        ...(events > SLOW_MOST ? [`${slow.join(' and ')} were given a backlog of ${SLOW_MOST} events`] : []),
        `no-op jobs have ${JSON.stringify(sample.data).length} bytes of data, as the relay's have`,
      ],
    };
  },
};
