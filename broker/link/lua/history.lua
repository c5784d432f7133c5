-- Part of a stream: the same arithmetic as broker/engine/selection.py.
--
-- KEYS  meta, stream; store, if there is one
-- ARGV  1 token for whatever must be made  2 life (ms)  3 now  4 size  5 ttl (s)
--       6 limit  7 'since', 'before', 'at' or 'tail'  8 its number  9 epoch of 'since'
-- Answer: epoch, top, commits, recovered, more, first offset, entries
local stream = KEYS[2]
local epoch, top = ensure(KEYS[1], stream, ARGV[1], ARGV[2])
local shown, commits = told(epoch, KEYS[3], ARGV[1])
local limit, kind, number = tonumber(ARGV[6]), ARGV[7], tonumber(ARGV[8])

local function id(offset)
  return string.format('%.0f-0', offset)
end

-- First offset from 'low' to 'high' whose time is later than 'bound' (or the same, unless 'later'), else high + 1.
local function first_from(low, high, bound, later)
  while low <= high do
    local middle = math.floor((low + high) / 2)
    local entry = redis.call('XRANGE', stream, id(middle), '+', 'COUNT', 1)[1]
    local ts = entry and tonumber(entry[2][2])
    if ts and (ts > bound or (ts == bound and not later)) then
      high = middle - 1
    else
      low = middle + 1
    end
  end
  return high + 1
end

-- Everything up to 'floor' is gone: not there any more, beyond the size, or too old.
local floor = top
local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
if oldest then
  floor = math.max(tonumber(string.match(oldest[1], '^%d+')) - 1, top - tonumber(ARGV[4]))
  local expired = ARGV[3] - ARGV[5]
  if tonumber(oldest[2][2]) <= expired then
    floor = math.max(floor, first_from(floor + 1, top, expired, true) - 1)
  end
end

local first, last, recovered, more = top + 1, top, 0, 0
if kind == 'since' then
  if ARGV[9] == shown and number <= top then
    first = math.max(number, floor) + 1
    last = math.min(first + limit - 1, top)
    recovered = number >= floor and 1 or 0
    more = last < top and 1 or 0
  end
elseif kind == 'at' then
  first = first_from(floor + 1, top, number, false)
  last = math.min(first + limit - 1, top)
  more = last < top and 1 or 0
else
  local count = limit
  if kind == 'before' then
    last = math.max(math.min(number - 1, top), floor)
  else
    count = math.min(number, limit)
  end
  first = math.max(last - count, floor) + 1
  more = first > floor + 1 and 1 or 0
end

local entries = {}
if first <= last then
  entries = redis.call('XRANGE', stream, id(first), id(last))
end
return {shown, top, commits, recovered, more, first, entries}
