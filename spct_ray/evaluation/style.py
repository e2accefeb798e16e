"""The report's style sheet and its one script (filters of the judgements, sorting of tables), inlined into the page."""

STYLE = """
:root{--ink:#1f2733;--soft:#667085;--line:#e4e7ee;--bg:#f6f7fa;--blue:#2f6fde;--orange:#e0662b;--grey:#8a94a6;
--green:#2a9d6f;--red:#d1495b;--amber:#b7791f;color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 -apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,"Liberation Sans","DejaVu Sans",sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1240px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:21px;margin:44px 0 12px;letter-spacing:-.01em}
h3{font-size:15.5px;margin:0 0 14px}
h4{font-size:12px;margin:14px 0 4px;color:var(--soft);text-transform:uppercase;letter-spacing:.05em}
.top p{color:var(--soft);margin:0 0 22px}
.missing{background:#fff8eb;border:1px solid #f3ddb0;border-radius:10px;padding:10px 16px 10px 34px;margin:0 0 18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin-bottom:18px}
.card,.panel,.sample{background:#fff;border:1px solid var(--line);border-radius:12px;
box-shadow:0 1px 2px rgba(16,24,40,.04)}
.card{padding:14px 18px;display:flex;flex-direction:column}
.card span{color:var(--soft);font-size:13px}
.card strong{font-size:27px;letter-spacing:-.02em;line-height:1.3;font-variant-numeric:tabular-nums}
.card small{color:var(--soft);font-size:12.5px}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px;align-items:start}
.panel{padding:18px 20px;min-width:0}
.wide{grid-column:1/-1}
.grid>div>.panel+.panel{margin-top:18px}
.panel img{display:block;width:100%;height:auto}
.note{color:var(--soft);font-size:13px;line-height:1.45;margin:10px 0 0}
.scroll{overflow-x:auto}
.scroll+.note+.scroll{margin-top:20px}
h2+.note{margin:-4px 0 14px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:7px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:500;font-size:12.5px}
th:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere;min-width:110px}
tbody th{font-weight:500}
tbody tr:last-child>*{border-bottom:0}
td b{font-weight:650}
td i{font-style:normal;color:var(--soft);font-size:12px;margin-left:3px}
.bars th:first-child{width:1%;white-space:nowrap}
.bars td{width:1%}.bars .barcell{width:auto;text-align:left;padding-right:0}
.bar{display:block;height:10px;border-radius:3px;background:#9db9ee;min-width:1px}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:8px;background:var(--grey)}
.dot.rft{background:var(--blue)}.dot.grpo{background:var(--orange)}
.filters{display:flex;flex-wrap:wrap;gap:16px;margin:0 0 14px}
.group{display:inline-flex;flex-wrap:wrap;overflow:hidden;background:#fff}
.group{border:1px solid var(--line);border-radius:8px}
.group button{font:inherit;font-size:13px;border:0;background:none;padding:5px 13px;cursor:pointer;color:var(--soft)}
.group button+button{border-left:1px solid var(--line)}
.group button[aria-pressed=true]{background:var(--ink);color:#fff}
.samples{columns:2;column-gap:18px}
.sample{padding:16px 18px;break-inside:avoid;margin:0 0 18px}
.sample[hidden]{display:none}
.sample>header{display:flex;align-items:center;gap:6px;font-weight:600;font-size:14px;margin-bottom:10px}
.sample>header .dot{margin-right:2px}
.tag{font-weight:400;font-size:12px;color:var(--soft);background:var(--bg);border-radius:5px;padding:1px 7px}
.badge{margin-left:auto;font-size:12px;border-radius:20px;padding:1px 10px;color:#fff;background:var(--amber)}
.badge.right{background:var(--green)}.badge.wrong{background:var(--red)}.badge.tied{background:var(--grey)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,
"DejaVu Sans Mono",monospace}
.query{background:var(--bg);border-radius:8px;padding:9px 12px;margin-bottom:8px}
.sample ol{list-style:none;margin:0;padding:0;display:grid;gap:8px}
.sample li{border:1px solid var(--line);border-radius:8px;padding:7px 12px 9px}
.sample li header{display:flex;align-items:center;gap:8px;font-size:12px;color:var(--soft);margin-bottom:2px}
.sample li b{margin-left:auto;font-size:15px;color:var(--ink)}
.best{font-style:normal;color:var(--green);font-weight:600}
.sortable thead th{cursor:pointer;user-select:none}
.sortable thead th:hover{color:var(--ink)}
.sortable thead th[aria-sort=ascending]::after{content:" ▴"}
.sortable thead th[aria-sort=descending]::after{content:" ▾"}
.heat td,.heat td i{color:var(--ink)}
small{color:var(--soft);font-weight:400}
@media(max-width:860px){.grid{grid-template-columns:minmax(0,1fr)}.samples{columns:1}main{padding:24px 14px 60px}
.bars th:first-child{white-space:normal;width:auto}}
"""

SCRIPT = """
const chosen = {};
const apply = () => document.querySelectorAll('.sample').forEach(s => {
  s.hidden = Object.entries(chosen).some(([key, value]) => value && s.dataset[key] !== value);
});
document.querySelectorAll('.group').forEach(group => {
  const key = group.dataset.key;
  const buttons = group.querySelectorAll('button');
  const pick = button => {
    buttons.forEach(b => b.setAttribute('aria-pressed', b === button));
    chosen[key] = button.dataset[key];
    apply();
  };
  buttons.forEach(b => b.addEventListener('click', () => pick(b)));
  pick(group.querySelector('[aria-pressed=true]'));
});
document.querySelectorAll('.sortable thead th').forEach(head => head.addEventListener('click', () => {
  const table = head.closest('table'), place = head.cellIndex, body = table.tBodies[0];
  const up = head.getAttribute('aria-sort') === 'descending';
  table.querySelectorAll('thead th').forEach(h => h.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => { const text = row.cells[place].textContent.trim().replace(/,/g, ''), n = parseFloat(text);
    return isNaN(n) ? text : n; };
  const compare = (a, b) => typeof a === typeof b ? (a > b) - (a < b) : typeof a === 'number' ? -1 : 1;
  [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(key(a), key(b))).forEach(row => body.append(row));
}));
"""
