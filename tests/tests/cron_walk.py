"""Says when crons are due, by walking along the wall clock of their zones: the independent half of the test cron_walk.rs.

Reads lines of JSON and answers each with one. The first names the zones and the years; its answer is, for each zone, the stretches of
time around the changes of its clock, in minutes of the epoch. Every other line is a cron with digests of the instants that the engine
found in these stretches and from a start on; its answer is `null`, or the instants themselves when the digests differ.
"""

import hashlib
import json
import sys
from array import array
from datetime import date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

DAY = 1440
AROUND = 3 * DAY
EPOCH = datetime(1970, 1, 1)
ORDINAL = date(1970, 1, 1).toordinal()
LAST = int((datetime(2101, 1, 1) - EPOCH).total_seconds()) // 60
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
WEEKDAYS = "sun mon tue wed thu fri sat".split()


def minute_of(year):
    return int((datetime(year, 1, 1) - EPOCH).total_seconds()) // 60


class Zone:
    def __init__(self, name, years):
        self.info = ZoneInfo(name)
        self.table = None
        changes, step = [], 360
        ahead = self.ahead(minute_of(years[0]))
        for start in range(minute_of(years[0]), minute_of(years[1]), step):
            then = self.ahead(start + step)
            if then != ahead:
                changes.append(next(m for m in range(start + 1, start + step + 1) if self.ahead(m) != ahead))
            ahead = then
        self.stretches = []
        for change in changes:
            if self.stretches and change - AROUND <= self.stretches[-1][1]:
                self.stretches[-1][1] = change + AROUND
            else:
                self.stretches.append([change - AROUND, change + AROUND])

    def walk(self):
        """The wall clock during the stretches, minute by minute: the minute, the time of day, the day, and whether the time is shown for
        the first time. And the times that the wall clock left out, each with the minute at which it went on."""
        if self.table:
            return self.table
        minutes, times, days, fresh, left_out = array("i"), array("h"), array("i"), bytearray(), []
        for start, end in self.stretches:
            before, seen, ahead = None, set(), {}
            for minute in range(start - 2 * DAY, end):
                hour = minute // 60
                if hour not in ahead:
                    first, last = self.ahead(hour * 60), self.ahead(hour * 60 + 59)
                    ahead[hour] = first if first == last else None
                wall = minute + (self.ahead(minute) if ahead[hour] is None else ahead[hour])
                if minute >= start:
                    minutes.append(minute)
                    times.append(wall % DAY)
                    days.append(wall // DAY)
                    fresh.append(wall not in seen)
                    left_out += [(minute, w % DAY, w // DAY) for w in range(before + 1, wall)]
                seen.add(wall)
                before = wall
        self.table = minutes, times, days, fresh, left_out
        return self.table

    def ahead(self, minute):
        """How many minutes the wall clock is ahead of UTC."""
        at = datetime.fromtimestamp(minute * 60, timezone.utc).astimezone(self.info)
        return int(at.utcoffset().total_seconds()) // 60

    def showing(self, wall):
        """The minutes at which the wall clock shows a time, and where it goes on when there are none."""
        naive = (EPOCH + timedelta(minutes=wall)).replace(tzinfo=self.info)
        guesses = {wall - int(naive.replace(fold=fold).utcoffset().total_seconds()) // 60 for fold in (0, 1)}
        shown = sorted(m for m in guesses if m + self.ahead(m) == wall)
        if shown:
            return shown, shown[0]
        low, high = min(guesses) - 1, max(guesses)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if middle + self.ahead(middle) >= wall else (middle, high)
        return [], high


def numbers(text, low, high, names=()):
    def number(word):
        word = word.lower()
        return names.index(word) + low if word in names else int(word)

    found = set()
    for item in text.split(","):
        item, _, step = item.partition("/")
        if item == "*":
            first, last = low, high
        elif "-" in item:
            first, last = (number(word) for word in item.split("-"))
            if last < first:
                last += len(names)
        else:
            first = number(item)
            last = high if step else first
        for n in range(first, last + 1, int(step or 1)):
            found.add(n - len(names) if n > max(high, 7 if names == WEEKDAYS else 0) else n)
    return found


class Cron:
    def __init__(self, text):
        minute, hour, day, month, weekday = text.split()
        minutes, hours = numbers(minute, 0, 59), numbers(hour, 0, 23)
        self.every = minute[0] == "*" or hour[0] == "*"
        self.times = [h * 60 + m for h in sorted(hours) for m in sorted(minutes)]
        self.is_time = bytearray(DAY)
        for time in self.times:
            self.is_time[time] = 1
        self.days, self.months = numbers(day, 1, 31), numbers(month, 1, 12, MONTHS)
        self.weekdays = {n % 7 for n in numbers(weekday, 0, 6, WEEKDAYS)}
        self.either = day[0] != "*" and weekday[0] != "*"
        self.known = {}

    def is_day(self, number):
        if number not in self.known:
            day = date.fromordinal(ORDINAL + number)
            of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
            self.known[number] = day.month in self.months and (of_month or of_week if self.either else of_month and of_week)
        return self.known[number]

    def around_changes(self, zone):
        is_time, is_day = self.is_time, self.is_day
        minutes, times, days, fresh, left_out = zone.walk()
        if self.every:
            return [minute for minute, time, day in zip(minutes, times, days) if is_time[time] and is_day(day)]
        rows = zip(minutes, times, days, fresh)
        due = {minute for minute, time, day, first in rows if is_time[time] and first and is_day(day)}
        due |= {minute for minute, time, day in left_out if is_time[time] and is_day(day)}
        return sorted(due)

    def first(self, zone, start, count):
        due, found, enough = set(), 0, None
        day = (start + zone.ahead(start)) // DAY - 2
        while day * DAY < LAST + 2 * DAY and (enough is None or day <= enough):
            if self.is_day(day):
                for time in self.times:
                    shown, goes_on = zone.showing(day * DAY + time)
                    for minute in shown if self.every else [goes_on]:
                        found += minute >= start and minute not in due
                        due.add(minute)
                if enough is None and found >= count:
                    enough = day + 2
            day += 1
        return sorted(minute for minute in due if start <= minute < LAST)[:count]


def digest(instants):
    return hashlib.sha256(",".join(map(str, instants)).encode()).hexdigest()


def main():
    first = json.loads(sys.stdin.readline())
    zones = {name: Zone(name, first["years"]) for name in first["zones"]}
    print(json.dumps({name: zone.stretches for name, zone in zones.items()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        cron, zone = Cron(asked["cron"]), zones[asked["zone"]]
        around, from_start = cron.around_changes(zone), cron.first(zone, asked["start"], asked["count"])
        same = digest(around) == asked["around"] and digest(from_start) == asked["first"]
        print("null" if same else json.dumps({"around": around, "first": from_start}), flush=True)


main()
