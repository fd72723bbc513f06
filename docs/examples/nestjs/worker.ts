/**
 * A NestJS worker that runs the relay beside an ordinary BullMQ queue, and shows both in one Bull Board.
 *
 * To run it, copy this folder, put the file that `npm pack` writes in a checkout of the relay beside package.json, and:
 *
 *     export RELAY_DATABASE_URL=postgresql://… RELAY_REDIS_URL=redis://…   # and further variables of the relay
 *     npm install
 *     npx relay migrate   # with the role that owns the table
 *     npm run build && npm start
 *
 * SIGTERM stops the relay and the worker of the queue in good order.
 */
import 'reflect-metadata';
import { createBullBoard } from '@bull-board/api';
import { BullMQAdapter } from '@bull-board/api/bullMQAdapter';
import { FastifyAdapter } from '@bull-board/fastify';
import { BullModule, InjectQueue, Processor, WorkerHost } from '@nestjs/bullmq';
import { Injectable, Module, type OnApplicationBootstrap, type OnApplicationShutdown } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import type { Job, Queue } from 'bullmq';
import fastify from 'fastify';
import { type BoardQueues, createBoardQueues, createRelay, loadConfig } from 'relay-service';

const config = loadConfig(process.env);
const boardPort = Number(process.env.BOARD_PORT ?? 3001);

/** The queue that this worker has always had. */
@Processor('mails')
export class MailProcessor extends WorkerHost {
  async process(job: Job<{ to: string }>): Promise<string> {
    return `sent to ${job.data.to}`;
  }
}

/** The whole relay: it claims and publishes from now on. Its health and metrics are at RELAY_HTTP_PORT. */
@Injectable()
export class RelayService implements OnApplicationBootstrap, OnApplicationShutdown {
  readonly #relay = createRelay(config);

  async onApplicationBootstrap(): Promise<void> {
    await this.#relay.start(); // rejects when a server is away or the table is not migrated: the worker does not start
  }

  async onApplicationShutdown(): Promise<void> {
    await this.#relay.stop(); // within RELAY_SHUTDOWN_TIMEOUT
  }
}

/** One board for all queues. It asks nobody for a password: reachable from this machine alone. */
@Injectable()
export class BoardService implements OnApplicationBootstrap, OnApplicationShutdown {
  readonly #server = fastify();
  #relayQueues: BoardQueues | undefined;
  @InjectQueue('mails') readonly mails!: Queue;

  async onApplicationBootstrap(): Promise<void> {
    this.#relayQueues = await createBoardQueues(config);
    const serverAdapter = new FastifyAdapter();
    serverAdapter.setBasePath('/board');
    createBullBoard({
      queues: [new BullMQAdapter(this.mails), ...this.#relayQueues.queues],
      serverAdapter,
      options: { handlerHooks: this.#relayQueues.handlerHooks },
    });
    await this.#server.register(serverAdapter.registerPlugin(), { prefix: '/board' });
    await this.#server.listen({ host: '127.0.0.1', port: boardPort });
  }

  async onApplicationShutdown(): Promise<void> {
    await this.#server.close();
    await this.#relayQueues?.close();
  }
}

@Module({
  imports: [
    BullModule.forRoot({ connection: { url: config.redisUrl } }),
    BullModule.registerQueue({ name: 'mails' }),
  ],
  providers: [MailProcessor, RelayService, BoardService],
})
export class WorkerModule {}

const app = await NestFactory.createApplicationContext(WorkerModule, { logger: ['error', 'warn'] });
app.enableShutdownHooks();
console.log(`worker is up; board at http://127.0.0.1:${boardPort}/board`);
