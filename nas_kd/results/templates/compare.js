(function () {
  const form = document.getElementById('pick'), picks = Array.from(form.querySelectorAll('select'));
  const lines = Array.from(document.getElementById('compare').rows).map(function (row) {
    return {row: row, cells: Array.from(row.cells)};
  });
  const show = function () {
    lines.forEach(function (line) {
      const two = picks.map(function (pick) { return line.cells[pick.value].cloneNode(true); });
      line.row.replaceChildren(line.cells[0], two[0], two[1]);
      line.row.classList.toggle('differs', two[0].textContent !== two[1].textContent);
    });
    const differ = document.querySelectorAll('#compare .blocks .differs').length;
    const blocks = document.querySelectorAll('#compare .blocks tr').length;
    form.querySelector('output').textContent = differ + ' of ' + blocks + ' blocks differ, marked \u2260';
  };
  form.hidden = false;
  form.addEventListener('change', show);
  show();
})();
