/**
 * The append script. It remembers what was appended, and it is the gate that keeps the order of an aggregate. Nothing else
 * appends to a stream of events, except `relay republish` with its marked copies (copies.ts).
 *
 * One call takes several entries, in the order of their ids, and is atomic. For each entry it answers, in this order:
 *
 * | answer | when |
 * |--------|------|
 * | `!`    | the epoch is another one: nothing of the call is appended |
 * | empty  | the job is gone, has ended, or was made again since: the row decides |
 * | `=id`  | its entry is remembered: an earlier run appended it |
 * | `<`    | the job was released by an earlier call, or is released now since the rows say that the event is behind |
 * | `*`    | the gate is `ask`: the pod has to ask the rows |
 * | `?`    | the stream is lost |
 * | `-why` | Redis refused the entry |
 * | `+id`  | it was appended; a dead letter that the job remembers is deleted |
 *
 * With the gate `after`, the event before must be in its stream, appended in this epoch. If it is not, the answer is
 *
 * | answer | when |
 * |--------|------|
 * | `*`    | the job of the event before is gone, or has ended: the pod has to ask the rows |
 * | `<!`   | the event before has failed: this job is released |
 * | `<`    | the job of the event before was released: so is this one |
 * | `~`    | early: the event before is on its way |
 *
 * After these comes a list of what the cascade appended: event id, entry id, and so on.
 *
 * Memory: `<epoch> <entry id>`. A memory of this epoch is good. A memory of an earlier epoch is good only if that entry is
 * in the stream now, and is the event's. Where Redis refuses to let the relay read the stream, nothing can be said of it: the
 * script refuses the event, and does not append it again. On one server the memory is a field of the job's hash, which ends
 * with the job, and until the row is marked published also a field of the hash of appended events: a claim that was rolled
 * back leaves rows without a lease, and if their jobs are deleted as well, nothing else knows that they were appended. Where
 * the streams have a server of their own it is a key beside the stream, the idempotency key.
 *
 * Lost streams: the hash of last entries has the last entry of each stream, appended or found in this epoch. If the stream
 * is gone, or its ids end before that (a consumer's `XGROUP CREATE ... MKSTREAM` makes an empty one, RENAME and RESTORE
 * bring an older copy), Redis has lost it with its entries.
 *
 * Cascade: an early entry is kept with the job that it waits for, and the call that appends the event of that job appends
 * the kept entry too. Without it, ten hot aggregates on two pods reach 880 events/s instead of 2,480 or more. With two
 * servers the entry is kept beside the idempotency key of the event before: without it, five hot aggregates on two pods
 * reach 11 events/s, since each event stays early until its next try. There the script cannot ask whether the job of a
 * kept entry still exists: an event whose job was removed or lost meanwhile is published all the same.
 *
 * KEYS: epoch, last entries, then the streams.
 * ARGV: epoch, its id, dead-letter stream, prefix of the memories' keys, then the entries as MessagePack. Each entry is an
 * array: position of its stream among the streams, event id, time at which its job was made, gate (see GATE), event id of
 * the event before, facts about its job and about the job of the event before (where jobs are on another server), key of
 * the memory of a dead letter, then the arguments of XADD after the key.
 *
 * Measured: a call for each entry would cost this process 25 µs and Redis 8 µs more per entry, and an argument for each
 * field 3 µs and 5 kB of garbage.
 */

import { APPENDED_SUFFIX, IS_LOST_STREAM } from './epoch-script.ts';

/** When an entry passes the gate. */
export const GATE = {
  /** Not yet: the rows have to be asked first. */
  ask: 0,
  /** When the event before it is in its stream. */
  after: 1,
  /** At once. */
  open: 2,
  /** Never: the rows say that it is behind, so its job is released. */
  release: 3,
} as const;
export type Gate = keyof typeof GATE;

/** Fields that the relay adds to a job's hash. BullMQ keeps and ignores them. */
const ENTRY_FIELD = 'relay:entry';
const RELEASED_FIELD = 'relay:released';
const NEXT_FIELD = 'relay:next';
export const LETTER_FIELD = 'relay:dlq';

/** Lifetime of an idempotency key. Each read renews it. It takes about 150 bytes of Redis for each event. */
export const MEMORY_TTL_S = 3_600;
/** Entries that the cascade appends in one call, at most: Redis does nothing else during a call. */
const CASCADE_MAX = 64;
/**
 * Lifetime of an early entry that is kept beside the stream. Each try of its job keeps it again. The lifetime is much
 * shorter than that of the memories, which say that an entry must not be appended any more.
 */
const NEXT_TTL_S = 60;
/** Streams whose last entry is kept, at most. */
export const LAST_ENTRIES_MAX = 10_000;

/** Needs ARGV[1] = epoch, ARGV[2] = its id, KEYS[2] = last entries. */
const MEMORY_AND_LAST_ENTRIES = `
${IS_LOST_STREAM}
local function entryOf(memory, stream, event)
  if not memory then return nil end
  local made, id = string.match(memory, '^(%S+) (%d+%-%d+)$')
  if made == ARGV[2] then return id end
  local answer = redis.pcall('XRANGE', stream, id or memory, id or memory)
  local isNone = answer.err and (string.find(answer.err, 'WRONGTYPE') or string.find(answer.err, 'Invalid stream ID'))
  if answer.err and not isNone then return nil, answer.err end
  local found = answer[1]
  if found and found[2][1] == 'event_id' and found[2][2] == event then return found[1] end
  return nil
end
local lost, last = {}, {}
local function isLost(stream)
  if lost[stream] ~= nil then return lost[stream] end
  local known = redis.call('HGET', KEYS[2], stream)
  lost[stream] = known and isLostStream(stream, known) or false
  return lost[stream]
end
local function noteLast()
  for stream, id in pairs(last) do
    if redis.call('HEXISTS', KEYS[2], stream) == 1 or redis.call('HLEN', KEYS[2]) < ${LAST_ENTRIES_MAX} then
      redis.call('HSET', KEYS[2], stream, id)
    end
  end
end
local function rememberFound(stream, id)
  if not last[stream] and redis.call('HEXISTS', KEYS[2], stream) == 0 then last[stream] = id end
end`;

/** The memory in the job's hash, and in that of appended events. Needs KEYS[1] = epoch. */
const IN_JOB = `
local memories = KEYS[1] .. '${APPENDED_SUFFIX}'
local function look(job, event)
  local it = redis.call('HMGET', job, '${ENTRY_FIELD}', 'timestamp', 'finishedOn', 'atm', '${RELEASED_FIELD}', '${NEXT_FIELD}', '${LETTER_FIELD}')
  local entry = it[1] or redis.call('HGET', memories, event)
  return {entry = entry, made = it[2], ended = it[3], failures = tonumber(it[4] or '0'), released = it[5], next = it[6], letter = it[7]}
end
local function remember(job, event, memory)
  redis.call('HSET', job, '${ENTRY_FIELD}', memory)
  redis.call('HSET', memories, event, memory)
end
local function release(job) redis.call('HSET', job, '${RELEASED_FIELD}', '1') end
local function forgetLetter(job) redis.call('HDEL', job, '${LETTER_FIELD}') end
local function keep(job, packed) redis.call('HSET', job, '${NEXT_FIELD}', packed) end
local function keptWith(_, it) return it.next end
local function mayFollow(it, made) return it.made == made and not (it.entry or it.released or it.ended or it.letter) end`;

/** The memory in an idempotency key. The pod has asked the other server about the jobs, and passes the facts. */
const IN_KEY = `
local function look(key, _, job, letterKey)
  local it = job and {made = job[1], ended = job[2], failures = job[3]} or {}
  local value = redis.call('GET', key)
  local released = value and string.match(value, '^released (.*)$')
  if released then it.released = released == it.made
  elseif value then
    it.entry = value
    redis.call('PEXPIRE', key, ${MEMORY_TTL_S * 1_000})
  end
  if letterKey and it.failures and it.failures > 0 then it.letter = redis.call('GET', letterKey) end
  return it
end
local function remember(key, _, memory) redis.call('SET', key, memory, 'EX', ${MEMORY_TTL_S}) end
local function release(key, made) redis.call('SET', key, 'released ' .. made, 'EX', ${MEMORY_TTL_S}) end
local function forgetLetter(_, letterKey) redis.call('DEL', letterKey) end
local function keep(key, packed) redis.call('SET', key .. ':next', packed, 'EX', ${NEXT_TTL_S}) end
local function keptWith(key) return redis.call('GET', key .. ':next') end
local function mayFollow(_, _, key, letterKey) return redis.call('EXISTS', key) == 0 and redis.call('EXISTS', letterKey) == 0 end`;

/** Values of an entry before the arguments of XADD. The last of them is the key of the dead letter's memory. */
const BEFORE_XADD = 8;

/** @param hasTwoServers the jobs are on another server than the streams */
export const gateScript = (hasTwoServers: boolean) => `
local entries = cmsgpack.unpack(ARGV[5])
local answers, cascaded = {}, {}
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  for n = 1, #entries do answers[n] = '!' end
  answers[#entries + 1] = cascaded
  return answers
end
${MEMORY_AND_LAST_ENTRIES}
${hasTwoServers ? IN_KEY : IN_JOB}
local function append(stream, key, event, xadd, from)
  local id = redis.pcall('XADD', stream, unpack(xadd, from))
  if type(id) == 'table' then return nil, id.err end
  remember(key, event, ARGV[2] .. ' ' .. id)
  last[stream] = id
  return id
end
local room = ${CASCADE_MAX}
local function cascade(kept)
  while kept and room > 0 do
    local waiting = cmsgpack.unpack(kept)
    local epoch, stream, event, made, letterKey = unpack(waiting, 1, 5)
    if epoch ~= ARGV[2] or isLost(stream) then return end
    local key = ARGV[4] .. event
    local it = look(key, event)
    if not mayFollow(it, made, key, letterKey) then return end
    local id = append(stream, key, event, waiting, 6)
    if not id then return end
    room = room - 1
    cascaded[#cascaded + 1] = event
    cascaded[#cascaded + 1] = id
    kept = keptWith(key, it)
  end
end
local function pass(entry)
  local stream, key = KEYS[2 + entry[1]], ARGV[4] .. entry[2]
  local _, event, made, gate, before, job, jobBefore, letterKey = unpack(entry, 1, ${BEFORE_XADD})
  local it = look(key, event, job, letterKey)
  if it.made ~= made or it.ended then return '' end
  local id, unread = entryOf(it.entry, stream, event)
  if unread then return '-' .. unread end
  if id then
    if it.entry ~= ARGV[2] .. ' ' .. id then
      remember(key, event, ARGV[2] .. ' ' .. id)
      rememberFound(stream, id)
    end
    return '=' .. id
  end
  if it.released then return '<' end
  if gate == ${GATE.release} then
    release(key, made)
    return '<'
  end
  if gate == ${GATE.ask} then return '*' end
  if isLost(stream) then return '?' end
  if gate == ${GATE.after} then
    local other = look(ARGV[4] .. before, before, jobBefore)
    if not (other.entry and string.find(other.entry, ARGV[2] .. ' ', 1, true) == 1) then
      if not other.made or other.ended then return '*' end
      if other.failures > 0 or other.released then
        release(key, made)
        return other.failures > 0 and '<!' or '<'
      end
      local kept = keptWith(ARGV[4] .. before, other)
      kept = kept and cmsgpack.unpack(kept)
      if not kept or kept[1] ~= ARGV[2] or kept[3] ~= event or kept[4] ~= made then
        keep(ARGV[4] .. before, cmsgpack.pack({ARGV[2], stream, event, made, unpack(entry, ${BEFORE_XADD})}))
      end
      return '~'
    end
  end
  local appended, refusal = append(stream, key, event, entry, ${BEFORE_XADD} + 1)
  if not appended then return '-' .. refusal end
  if it.letter then
    redis.pcall('XDEL', ARGV[3], string.match(it.letter, '%d+%-%d+$'))
    forgetLetter(key, letterKey)
  end
  cascade(keptWith(key, it))
  return '+' .. appended
end
for n, entry in ipairs(entries) do answers[n] = pass(entry) end
noteLast()
answers[#entries + 1] = cascaded
return answers`;

/**
 * Appends the dead letter of a job whose retries are spent, once. The event of a job that remembers an entry is not
 * dead-lettered: it is published.
 *
 * KEYS: epoch, last entries, dead-letter stream, key of the memory, key of the dead letter's memory.
 * ARGV: epoch, its id, event id, its stream, 1 if the job must be there and have ended, time at which it was made, facts
 * about it as MessagePack, then what XADD takes after the key.
 * Answers as the append script does; `^id` is the event's entry, which is remembered.
 *
 * The event's stream is not among the KEYS. It may be a key that the relay has no right to, which is why the event is
 * given up, or it may be on another node of a cluster.
 */
export const letterScript = (hasTwoServers: boolean) => `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return '!' end
${MEMORY_AND_LAST_ENTRIES}
${hasTwoServers ? IN_KEY : IN_JOB}
local facts = cmsgpack.unpack(ARGV[7])
local it = look(KEYS[4], ARGV[3], facts, KEYS[5])
if ARGV[5] == '1' then
  if it.made ~= ARGV[6] or not it.ended then return '' end
  local entry, unread = entryOf(it.entry, ARGV[4], ARGV[3])
  if unread then return '-' .. unread end
  local letter = not entry and entryOf(it.letter, KEYS[3], ARGV[3])
  if entry or letter then
    rememberFound(entry and ARGV[4] or KEYS[3], entry or letter)
    noteLast()
    return entry and '^' .. entry or '=' .. letter
  end
end
if isLost(KEYS[3]) then return '?' end
local id = redis.pcall('XADD', KEYS[3], unpack(ARGV, 8))
if type(id) == 'table' then return '-' .. id.err end
if ARGV[5] == '1' then
  ${
    hasTwoServers
      ? `redis.call('SET', KEYS[5], ARGV[2] .. ' ' .. id, 'EX', ${MEMORY_TTL_S})`
      : `redis.call('HSET', KEYS[4], '${LETTER_FIELD}', ARGV[2] .. ' ' .. id)`
  }
end
last[KEYS[3]] = id
noteLast()
return '+' .. id`;

/**
 * Answers the entry that is remembered and good, '' when there is none, or why Redis refuses to tell.
 * KEYS: epoch, key of the memory. ARGV: event id, epoch's id, the event's stream (not a key, for the reasons above).
 */
export const RECALL = (hasTwoServers: boolean) => `
${MEMORY_AND_LAST_ENTRIES}
${hasTwoServers ? IN_KEY : IN_JOB}
local id, unread = entryOf(look(KEYS[2], ARGV[1]).entry, ARGV[3], ARGV[1])
return id or unread or ''`;
