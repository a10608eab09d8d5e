(function () {
  const plots = Array.from(document.querySelectorAll('.plot'));
  const style = function (name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); };
  const colours = function () {
    return {'font.color': style('--text'), 'font.family': getComputedStyle(document.body).fontFamily};
  };
  plots.forEach(function (plot) {
    const figure = JSON.parse(document.getElementById(plot.id + '-data').textContent);
    Object.assign(figure.layout.font, {color: style('--text'), family: getComputedStyle(document.body).fontFamily});
    Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
  });
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', function () {
    plots.forEach(function (plot) { Plotly.relayout(plot, colours()); });
  });
})();
