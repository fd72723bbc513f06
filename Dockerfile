FROM node:24-slim AS base
WORKDIR /app
COPY package.json package-lock.json ./

# No install scripts: what they would fetch (servers for the demo and the tests) is not needed here.
FROM base AS build
RUN npm ci --ignore-scripts --no-audit --no-fund
COPY tsconfig.json .bundle.mjs ./
COPY src ./src
RUN npm run build && find dist -name '*.d.ts' -delete

FROM base AS dependencies
# What no pod needs: the compiler, which comes along because a library names it as an optional peer, source maps, types.
RUN npm ci --omit=dev --ignore-scripts --no-audit --no-fund \
  && rm -rf node_modules/.bin node_modules/typescript node_modules/@typescript \
  && find node_modules -type f \( -name '*.map' -o -name '*.ts' -o -name '*.mts' -o -name '*.cts' \) -delete

FROM node:24-slim
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="relay-service" \
  org.opencontainers.image.description="Publishes the rows of a PostgreSQL outbox to Redis Streams" \
  org.opencontainers.image.licenses="MIT" \
  org.opencontainers.image.version="$VERSION"
# V8 of Node.js 24 lets its young generation grow to 128 MiB: with 32 a pod takes 100 MiB less, for 5 % of its speed.
ENV NODE_ENV=production NODE_OPTIONS=--max-semi-space-size=16
WORKDIR /app
# Everything belongs to root and nothing is written at run time: a read-only root file system is fine.
COPY --from=dependencies /app/package.json ./
COPY --from=dependencies /app/node_modules ./node_modules
COPY --from=build /app/dist ./dist
COPY drizzle ./drizzle
# For docker exec.
RUN ln -s /app/dist/cli.js /usr/local/bin/relay
# The image's user `node`, by number: Kubernetes can prove of a number only that it is not root (runAsNonRoot).
USER 1000:1000
EXPOSE 8004
# Start-up waits up to RELAY_STARTUP_TIMEOUT (30 s) for PostgreSQL and Redis.
HEALTHCHECK --interval=15s --timeout=5s --start-period=45s --retries=3 \
  CMD ["node", "-e", "fetch(`http://127.0.0.1:${(process.env.RELAY_HTTP_PORT || '8004').trim()}/livez`, { signal: AbortSignal.timeout(4000) }).then((answer) => process.exit(answer.ok ? 0 : 1), () => process.exit(1))"]
# Node is process 1: it handles SIGTERM itself and starts no processes that would need an init to reap them.
ENTRYPOINT ["node", "dist/cli.js"]
CMD ["start"]
