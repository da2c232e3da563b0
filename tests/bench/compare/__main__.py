import argparse
import json
import statistics
import subprocess
import sys
import tempfile

import ferry
import qemu
from one import Warm, migrate
from scenarios import SCENARIOS


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ferry", required=True)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--floors", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append")
    parser.add_argument("--vmm", action="append")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as d:
        vmms = [v for v in (ferry.Vmm(a.ferry, a.kernel, d, 4601), qemu.Vmm("qemu-system-x86_64", a.kernel, d, 4602)) if not a.vmm or v.name in a.vmm]
        for s in SCENARIOS:
            if a.only and s.name not in a.only:
                continue
            print(s.title, flush=True)
            rs = {v.name: [] for v in vmms}
            fl = []
            for _ in range(a.rounds):
                Warm(a.floors, 2 * s.fill + (128 << 20)).release()
                out = subprocess.run([a.floors, "tcp", "huge", str(s.fill)], capture_output=True, check=True).stdout
                fl.append(json.loads(out)["seconds"] * 1e3)
                for v in vmms:
                    rs[v.name].append(migrate(v, s, a.floors))
            print("  floor", round(statistics.median(fl), 1), [round(x) for x in fl])
            for n, r in rs.items():
                for k in r[0]:
                    xs = [x[k] for x in r if k in x]
                    print(f"  {n:6} {k:14} {statistics.median(xs):9.2f} ({min(xs):.2f}-{max(xs):.2f})", flush=True)


main()
